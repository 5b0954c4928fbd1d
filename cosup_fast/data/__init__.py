"""Passages and examples: records, the text that models read, packs without padding, and prepared data."""
