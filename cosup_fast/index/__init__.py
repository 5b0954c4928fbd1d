"""The nonparametric index: every passage as one vector of Embseq, searched by inner product.

1. `embed_passages` turns passages into sequence embeddings, `embed_queries` teacher-forced [NSP] tokens into queries.
2. `SequenceIndex` holds the embeddings next to their passages, in memory or in a folder that is mapped into memory.
3. An index is stamped with the weights and the template that made it, and with checksums of its files, so that the
   queries of one checkpoint are never searched among the embeddings of another.

The text that is embedded is the text that Gen is given after a retrieval, title included. Source: Lee et al. 2024,
arXiv 2403.09024, section 3.
"""

from cosup_fast.index.build import Options
from cosup_fast.index.embed import embed_passages, embed_queries, evaluation_mode
from cosup_fast.index.origin import INDEX, STAMP, Origin
from cosup_fast.index.sequence_index import SequenceIndex

__all__ = [
    "INDEX",
    "STAMP",
    "Options",
    "Origin",
    "SequenceIndex",
    "embed_passages",
    "embed_queries",
    "evaluation_mode",
]
