"""Ratings made of biases and two tastes, in RecBole's format, and models that are trained in seconds."""

import numpy as np

from lspm_models.data.interactions import Interactions

GENRES = ("Action", "Comedy", "Drama")


def tastes(users=40, items=30, each=15, seed=0):
    """Users, items, ratings 1 to 5 and times; whoever is of odd number likes items of odd number."""
    generator = np.random.default_rng(seed)
    bias = generator.normal(0, 0.5, users), generator.normal(0, 0.5, items)
    u = np.repeat(np.arange(users), each)
    i = np.concatenate([generator.permutation(items)[:each] for _ in range(users)])
    taste = np.where(u % 2 == i % 2, 0.8, -0.8)
    ratings = (3.2 + bias[0][u] + bias[1][i] + taste + generator.normal(0, 0.2, len(u))).clip(1, 5).round()
    return u, i, ratings, generator.permutation(len(u)) + 1000.0


def write_recbole(folder, name="tiny", **options):
    """Writes NAME.inter, NAME.user and NAME.item and returns the folder; ids are numbers from 1."""
    folder.mkdir(parents=True, exist_ok=True)
    users, items, ratings, times = tastes(**options)
    lines = ["user_id:token\titem_id:token\trating:float\ttimestamp:float"]
    lines += [
        f"{u + 1}\t{i + 1}\t{r:g}\t{t:g}" for u, i, r, t in zip(users, items, ratings, times, strict=True)
    ]
    (folder / f"{name}.inter").write_text("\n".join(lines) + "\n")
    lines = ["user_id:token\tage:token\tgender:token\tzip_code:token"]
    lines += [f"{u + 1}\t{15 + u}\t{'FM'[u % 2]}\t{90000 + u}" for u in range(users.max() + 1)]
    (folder / f"{name}.user").write_text("\n".join(lines) + "\n")
    lines = ["item_id:token\tmovie_title:token_seq\trelease_year:token\tclass:token_seq"]
    lines += [
        f"{i + 1}\tFilm No. {i + 1}\t{1970 + i}\t{GENRES[i % 3]} {'Odd' if i % 2 else 'Even'}"
        for i in range(items.max() + 1)
    ]
    (folder / f"{name}.item").write_text("\n".join(lines) + "\n")
    return folder


def interactions(**options):
    """The same ratings by number."""
    users, items, ratings, times = tastes(**options)
    return Interactions.from_arrays(users, items, ratings, timestamps=times)
