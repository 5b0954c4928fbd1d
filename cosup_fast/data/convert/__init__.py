"""Published training and evaluation files to passages and examples; docs/data.md has the forms that are read.

A conversion reads row by row and writes a folder that appears whole or not at all. A row that does not have its form is
a `DataError` with its line, or is counted and left out when malformed rows are to be skipped.
"""

from cosup_fast.data.convert.beir import convert_beir
from cosup_fast.data.convert.judged import convert_dpr, convert_sentence_transformers, convert_tevatron
from cosup_fast.data.convert.kilt import convert_kilt
from cosup_fast.data.convert.self_rag import convert_self_rag, self_rag_example

__all__ = [
    "convert_beir",
    "convert_dpr",
    "convert_kilt",
    "convert_self_rag",
    "convert_sentence_transformers",
    "convert_tevatron",
    "self_rag_example",
]
