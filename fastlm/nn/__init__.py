"""Drop-in modules over the operators."""

from fastlm.nn.adaptive_softmax import AdaptiveSoftmax
from fastlm.nn.cache import CacheRing, CacheState, CacheTuning, NeuralCache
from fastlm.nn.dropout import EmbeddingDropout, LockedDropout, WeightDrop
from fastlm.nn.lstm import LSTM
from fastlm.nn.qrnn import QRNN, QRNNEncoding
from fastlm.nn.qrnn_decoder import QRNNDecoder
from fastlm.nn.qrnn_layer import QRNNLayer, QRNNState
from fastlm.nn.softmax import LinearCrossEntropyLoss

__all__ = [
    "LSTM",
    "QRNN",
    "AdaptiveSoftmax",
    "CacheRing",
    "CacheState",
    "CacheTuning",
    "EmbeddingDropout",
    "LinearCrossEntropyLoss",
    "LockedDropout",
    "NeuralCache",
    "QRNNDecoder",
    "QRNNEncoding",
    "QRNNLayer",
    "QRNNState",
    "WeightDrop",
]
