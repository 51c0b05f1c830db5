"""Language models, each from a dataclass config."""

from fastlm.models.awd import (
    LanguageModel,
    LanguageModelConfig,
    LossOutput,
    ModelOutput,
    ScoreOutput,
    State,
    detach_state,
    map_state,
)

__all__ = [
    "LanguageModel",
    "LanguageModelConfig",
    "LossOutput",
    "ModelOutput",
    "ScoreOutput",
    "State",
    "detach_state",
    "map_state",
]
