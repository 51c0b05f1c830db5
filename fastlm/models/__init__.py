"""Language models, each from a dataclass config."""

from fastlm.models.awd import (
    LanguageModel,
    LanguageModelConfig,
    LossOutput,
    ModelOutput,
    ScoreOutput,
    State,
    detach_state,
    join_states,
    map_state,
    state_columns,
)

__all__ = [
    "LanguageModel",
    "LanguageModelConfig",
    "LossOutput",
    "ModelOutput",
    "ScoreOutput",
    "State",
    "detach_state",
    "join_states",
    "map_state",
    "state_columns",
]
