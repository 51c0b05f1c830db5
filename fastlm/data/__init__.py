"""Text -> ids, vocabularies, and the windows and orders that training reads them in."""

from fastlm.data.corpus import Corpus, encode_file, load_corpus
from fastlm.data.loader import BPTTLoader, batchify, eval_windows
from fastlm.data.sampler import SortishSampler, SortSampler
from fastlm.data.vocabulary import EOS, UNK, Vocabulary

__all__ = [
    "EOS",
    "UNK",
    "BPTTLoader",
    "Corpus",
    "SortSampler",
    "SortishSampler",
    "Vocabulary",
    "batchify",
    "encode_file",
    "eval_windows",
    "load_corpus",
]
