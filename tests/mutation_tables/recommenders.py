"""Bugs in the recommenders: what they read, how they split, rank and measure, and what they may see."""

from functools import partial

from mutations import Mutation

MODELS = "python/lspm_models"
in_files = partial(
    Mutation, file=f"{MODELS}/data/rating_files.py", tests=("tests/models/test_interactions.py", "-x")
)
in_splits = partial(
    Mutation, file=f"{MODELS}/data/rating_splits.py", tests=("tests/models/test_rating_splits.py", "-x")
)
in_metrics = partial(
    Mutation,
    file=f"{MODELS}/recommender_metrics.py",
    tests=("tests/models/test_recommender_metrics.py", "-x"),
)
QUICK = ("tests/models/test_recommenders.py", "-x", "-k", "not learn")
in_fields = partial(Mutation, file=f"{MODELS}/models/recommender_fields.py", tests=QUICK)
in_model = partial(Mutation, file=f"{MODELS}/models/recommender.py", tests=QUICK)
in_tower = partial(Mutation, file=f"{MODELS}/models/two_tower.py", tests=QUICK)

MUTATIONS = [
    in_files(
        name="ratings: a broken line brings an id", old="            Ids.check(name)", new="            pass"
    ),
    in_files(
        name="ratings: a line of another width is read",
        old="if len(cells) != self.width:",
        new="if len(cells) < self.width - 9:",
    ),
    in_splits(
        name="splits: the first rating of a user is its last",
        old="order = _times(interactions).argsort(stable=True)",
        new="order = _times(interactions).argsort(stable=True, descending=True)",
    ),
    in_splits(
        name="splits: a test rating stays in training",
        old="    kept[test] = False",
        new="    kept[test[1:]] = False",
    ),
    in_metrics(
        name="metrics: NDCG's discounts begin one place late",
        old="discounts = 1 / (places + 1).log2()",
        new="discounts = 1 / (places + 2).log2()",
    ),
    in_metrics(
        name="metrics: equal scores count for the negatives",
        old="mean_ranks = last - (counts.double() - 1) / 2",
        new="mean_ranks = last - (counts.double() - 1)",
    ),
    in_metrics(
        name="metrics: what a user has seen is ranked",
        old="        if seen is not None:",
        new="        if seen is not None and position:",
    ),
    in_fields(
        name="history: a rating explains itself",
        old="        if others is not None:",
        new="        if others is not None and self.training:",
    ),
    in_fields(
        name="history: the first are kept, not the last",
        old="behind = counts.cumsum(0)[rows[order]] - torch.arange(len(rows))",
        new="behind = torch.arange(len(rows)) - (counts.cumsum(0) - counts)[rows[order]] + 1",
    ),
    in_fields(
        name="fields: the sum of a row's values",
        old=', mode="mean"',
        new=', mode="sum"',
    ),
    in_model(
        name="deepfm: the squares stay in the square of the sum",
        old=" - embeddings.square().sum(1)",
        new="",
    ),
    in_tower(name="two-tower: no correction of popularity", old="(logits - log_shares)", new="logits"),
    in_tower(
        name="two-tower: what a user has met is a negative",
        old="masked_fill(~negatives, -torch.inf)",
        new="masked_fill(~negatives & ~met, -torch.inf)",
    ),
]
