"""Training, evaluation and generation: recipes, runs, checkpoints."""

from fastlm.training.checkpoint import load_checkpoint, load_weights, save_checkpoint
from fastlm.training.evaluate import Evaluation, cache_evaluate, evaluate, tune_cache
from fastlm.training.generate import generate
from fastlm.training.recipe import Recipe, finetune_recipe, load_recipe, make_recipe, read_recipe, recipe_names
from fastlm.training.report import write_report
from fastlm.training.run import read_run, run_corpus, run_model, run_vocabulary
from fastlm.training.trainer import Interrupted, Trainer

__all__ = [
    "Evaluation",
    "Interrupted",
    "Recipe",
    "Trainer",
    "cache_evaluate",
    "evaluate",
    "finetune_recipe",
    "generate",
    "load_checkpoint",
    "load_recipe",
    "load_weights",
    "make_recipe",
    "read_recipe",
    "read_run",
    "recipe_names",
    "run_corpus",
    "run_model",
    "run_vocabulary",
    "save_checkpoint",
    "tune_cache",
    "write_report",
]
