"""A text and hyper-parameters small enough to train on in a test."""

import random

SMALL = {
    **{"embedding_size": 8, "hidden_size": 12, "num_layers": 2, "batch_size": 4, "bptt": 10, "epochs": 3},
    **{"lr": 5.0, "nonmono": 0, "eval_batch_size": 2, "test_batch_size": 1, "log_interval": 3, "seed": 3},
}
WORDS = ["the", "a", "cat", "dog", "sat", "ran", "on", "under", "mat", "hill", "and", "then", "<unk>"]


def write_text(folder, lines=60):
    """train.txt, valid.txt and test.txt in a folder, which is made; the first of so many lines."""
    folder.mkdir(exist_ok=True)
    rng = random.Random(0)
    for split, count in [("train", lines), ("valid", 12), ("test", 12)]:
        text = "\n".join(" ".join(rng.choices(WORDS, k=rng.randint(3, 9))) for _ in range(count))
        (folder / f"{split}.txt").write_text(text + "\n")
    return folder
