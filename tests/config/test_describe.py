"""The configuration explains itself: docs/configuration.md is generated, and `train --show` prints what it reads."""

from pathlib import Path

from cosup_fast.config import field_names, load_config
from cosup_fast.config.describe import describe, dump_commented, page
from cosup_fast.config.model import NSPConfig

ROOT = Path(__file__).parents[2]


def test_the_page_is_the_generated_one():
    committed = (ROOT / "docs" / "configuration.md").read_text(encoding="utf-8")
    assert committed == page(), "python -m cosup_fast.config.describe > docs/configuration.md"


def test_every_field_is_described_by_its_kind():
    described = list(describe())
    assert [field.name for field in described] == field_names()
    assert not [field.name for field in described if "see the description" in field.allowed]


def test_what_is_shown_with_comments_is_read_back(tmp_path):
    config = load_config(None, ["training.lr=1e-4", "model.gen_lora.rank=8", 'model.gen_lora.targets=["q_proj"]'])
    shown = tmp_path / "shown.yaml"
    shown.write_text(dump_commented(config), encoding="utf-8")
    assert load_config(shown) == config
    assert f"  # {NSPConfig.model_fields['weight'].description}\n" in shown.read_text()
