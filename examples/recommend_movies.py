# %% [markdown]
# # Films that you may like
#
# 100,000 ratings of MovieLens, a matrix factorisation that learns them, how good it is, and what it
# recommends, to whom it knows and to whom it met a moment ago. `python/recommend.py` does the same from a
# command line, and a DeepFM beside it.

# %%
import argparse
import time

import torch

from lspm_models.data.interactions import Interactions
from lspm_models.data.rating_files import read_interactions
from lspm_models.data.rating_splits import split
from lspm_models.models.matrix_factorization import MatrixFactorization, MatrixFactorizationConfig
from lspm_models.recommender_metrics import rmse

parser = argparse.ArgumentParser(description="Learn ratings of films, and recommend.")
parser.add_argument("--factors", type=int, default=64)
parser.add_argument("--epochs", type=int, default=60)
parser.add_argument("--data", default="ml-100k", help="or your own ratings: a file or a folder of RecBole's")
options = parser.parse_args()

# %% [markdown]
# The ratings come out of the package recbole. Where that is missing, this makes up people and films of three
# tastes, and says so: they show how it works, and no more.


# %%
def made_up(people=400, films=200, each=40):
    random = torch.Generator().manual_seed(0)
    users = torch.arange(people).repeat_interleave(each)
    items = torch.stack([torch.randperm(films, generator=random)[:each] for _ in range(people)]).flatten()
    liked = (users % 3 == items % 3).float()
    ratings = (2.6 + 1.8 * liked + 0.5 * torch.randn(len(users), generator=random)).round().clamp(1, 5)
    kinds = "comedy", "drama", "western"
    names = [f"{kinds[item % 3]} no. {item}" for item in items.tolist()]
    return Interactions.from_arrays(users.tolist(), names, ratings.tolist())


try:
    ratings = read_interactions(options.data)
except ValueError as error:
    if options.data != "ml-100k":
        raise
    print(f"{error}\nInstead, ratings of films that do not exist are made up here.\n")
    ratings = made_up()
known, later = split(ratings, "random", folds=5)
people, films = len(ratings.user_ids), len(ratings.item_ids)
print(f"{len(ratings):,} ratings of {films:,} films by {people:,} people; a fifth of them is set aside")

# %% [markdown]
# Biases and factors by stochastic gradient descent, a call of `mf_sgd_` for each pass over the ratings.

# %%
config = MatrixFactorizationConfig.of("sgd", factors=options.factors, epochs=options.epochs)
began = time.perf_counter()
model = MatrixFactorization(config).fit(known)
print(f"{options.epochs} passes took {time.perf_counter() - began:.2f} s")
average = torch.full((len(later),), known.ratings.mean().item())
error, plain = (rmse(p, later.ratings) for p in (model.predict(later.users, later.items), average))
print(f"error of ratings set aside: {error:.3f}, by the average of all {plain:.3f}")

# %% [markdown]
# What somebody has not seen and may like, and because of which of their ratings.

# %%
person = ratings.user_ids.names[0]
(best,) = model.recommend([person], 5)
print(f"\nfor {person}:")
for film in best:
    reasons = ", ".join(reason.title for reason in model.explain(person, film.item, 2))
    print(f"  {film.score:.2f}  {film.title}   because of {reasons}")
print(f"\nlike {best[0].title}:", ", ".join(film.title for film in model.similar_items(best[0].item, 3)))

# %% [markdown]
# Somebody new, who has rated three films: nobody else changes.

# %%
liked = [ratings.item_ids.names[item] for item in known.popularity().argsort(descending=True)[:3].tolist()]
model.partial_fit(Interactions.from_arrays(["newcomer"] * 3, liked, [5.0, 4.0, 5.0]))
print("\nfor a newcomer:", ", ".join(film.title for film in model.recommend(["newcomer"], 5)[0]))
