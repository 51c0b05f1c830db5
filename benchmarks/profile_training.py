"""Where the time of one training step goes: `python benchmarks/profile_training.py --recipe ptb-lstm`.

Makes the trainer's own steps on random ids, with the sizes of a recipe, and prints the time of a step by what it is
spent on. A product of matrices counts as GEMM wherever it stands, also within the operators.
"""

import argparse
import re
import tempfile
import time
from collections import Counter
from pathlib import Path

import torch

from fastlm.data import Corpus, Vocabulary
from fastlm.training import Trainer, load_recipe
from fastlm.training.recipe import parse_override

# An event's own time goes to the first group of which a pattern matches its name, else to that of its caller.
GROUPS = [
    ("GEMM", r"^aten::(add|badd|b)?mm(_|$)|^mkldnn::_linear|^fastlm::matmul"),
    ("LSTM kernel", r"^fastlm::lstm"),
    ("QRNN pooling", r"^fastlm::qrnn_pool"),
    ("softmax", r"^fastlm::linear_cross_entropy_rows_"),
    ("masks", r"^fastlm::dropconnect"),
    ("clipping", r"^clipping$"),
    ("optimiser", r"^Optimizer\.step"),
    ("bias gradients", r"^aten::sum$"),
    ("embedding", r"^aten::embedding|^aten::index"),
    ("copies", r"^aten::(copy_|cat|clone|fill_|zero_|zeros|contiguous|slice_backward)"),
    ("locked dropout, AR, TAR", r"^aten::(mul|pow|sub|mean|div|add_?|neg|expand)"),
]
PHASES = ("clipping", "optimiser")  # what runs for them is theirs, whatever it is


def profile(recipe, vocab_size: int, steps: int) -> tuple[Counter, float]:
    """Milliseconds of a step by group, and the median of whole steps without the profiler."""
    ids = torch.randint(vocab_size, (recipe.batch_size * recipe.bptt * 2,))
    corpus = Corpus("random", "word", Vocabulary(map(str, range(vocab_size))), ids, ids[:200], ids[:200], "random")
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(Path(folder) / "run", recipe, corpus)
        trainer.model.train()
        inputs, targets = torch.randint(vocab_size, (2, recipe.bptt, recipe.batch_size))
        times = []
        for _ in range(2 + steps):
            before = time.perf_counter()
            trainer._train_step(inputs, targets, 1.0)
            times.append(time.perf_counter() - before)

        clip = torch.nn.utils.clip_grad_norm_
        try:
            torch.nn.utils.clip_grad_norm_ = torch.profiler.record_function("clipping")(clip)
            with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as record:
                for _ in range(steps):
                    trainer._train_step(inputs, targets, 1.0)
        finally:
            torch.nn.utils.clip_grad_norm_ = clip
    spent = Counter()
    for event in record.events():
        spent[_group(event)] += event.self_cpu_time_total / 1e3 / steps
    return spent, sorted(times[2:])[steps // 2] * 1e3


def _group(event) -> str:
    groups = []
    while event is not None:
        groups += [group for group, pattern in GROUPS if re.search(pattern, event.name)][:1]
        event = event.cpu_parent
    phase = next((group for group in groups if group in PHASES), None)
    return phase or (groups[0] if groups else "other")


def main():
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.partition(":")[0])
    parser.add_argument("--recipe", default="ptb-lstm")
    parser.add_argument("--vocab-size", type=int, default=10_000)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="as in fastlm train")
    args = parser.parse_args()
    recipe = load_recipe(args.recipe, dict(parse_override(text) for text in args.set))
    spent, whole = profile(recipe, args.vocab_size, args.steps)
    sizes = f"T={recipe.bptt} B={recipe.batch_size} V={args.vocab_size} {recipe.precision}"
    print(f"{args.recipe} {sizes}, {torch.get_num_threads()} threads, PyTorch {torch.__version__}")
    print(f"{'whole step, unprofiled':24} {whole:8.1f} ms")
    for group, ms in spent.most_common():
        print(f"{group:24} {ms:8.1f} ms {100 * ms / spent.total():5.1f} %")


if __name__ == "__main__":
    main()
