"""A study: conditions x seeds, each trained and evaluated as one resumable cell, and a report of what differs.

`config` reads the YAML and lists the cells, `cell` makes one, `runner` makes those that are missing, `status` says how
far it is, `estimates` and `report` compare the conditions, `render` writes HTML, Markdown and JSON.
"""

from cosup_fast.study.config import Cell, Study, StudyError, load_study
from cosup_fast.study.result import CellResult, read_cell
from cosup_fast.study.runner import run_study

__all__ = ["Cell", "CellResult", "Study", "StudyError", "load_study", "read_cell", "run_study"]
