"""What a recommender sees of a user or an item: its id, what is known of it, and whom it met before."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lspm_kernels
from lspm_models.data.interactions import Features, Interactions, offsets_of
from lspm_models.recommender_metrics import spread

DEVIATION = 0.05  # of new embeddings; their products begin far below a rating's deviation
DAMPING = 5.0  # ratings at the mean that every user and item begins with


def damped_biases(training: Interactions, rounds: int = 10) -> tuple[float, Tensor, Tensor]:
    """Returns the mean rating, and how far users and items are from it, as if each had DAMPING ratings more.

    Returns:
        The mean, (U,) and (I,): b_i = sum (r - mean - b_u) / (n_i + DAMPING), and b_u likewise, in turn.

    Source: Koren, Factorization meets the neighborhood, 2008, section 2.1.
    """
    users, items, mean = training.users, training.items, training.ratings.mean()
    rest = training.ratings - mean
    counts = [torch.bincount(users, minlength=len(training.user_ids)) + DAMPING]
    counts += [torch.bincount(items, minlength=len(training.item_ids)) + DAMPING]
    of_users, of_items = (torch.zeros(len(count)) for count in counts)
    for _ in range(rounds):
        of_items = torch.zeros_like(of_items).index_add(0, items, rest - of_users[users]) / counts[1]
        of_users = torch.zeros_like(of_users).index_add(0, users, rest - of_items[items]) / counts[0]
    return mean.item(), of_users, of_items


class History(nn.Module):
    """Whom a row met in training, as two sums of embeddings: of all, and of all by their residual ratings.

    h = n^-1/2 sum y_j and g = n^-1/2 sum (r_j - mean - b - b_j) z_j, with one more in n than there are. The
    partner of the pair in question is left out, so that a rating never explains itself.

    Args:
        rows: (N,) int64 of the training ratings.
        partners: (N,) int64, whom the rows met.
        residuals: (N,) float32.
        sizes: how many rows and partners there are.
        width: of an embedding.
        most: partners of a row that are kept, the last in the data.
        dropout: probability of leaving a partner out, in training.

    Source: Koren, Factorization meets the neighborhood, 2008, equations 13 and 15.
    """

    def __init__(
        self,
        rows: Tensor,
        partners: Tensor,
        residuals: Tensor,
        sizes: tuple[int, int],
        width: int,
        *,
        most: int,
        dropout: float,
    ) -> None:
        super().__init__()
        order = rows.argsort(stable=True)
        counts = torch.bincount(rows, minlength=sizes[0])
        behind = counts.cumsum(0)[rows[order]] - torch.arange(len(rows))  # 1 for the last of a row
        order = order[behind <= most]
        for name, value in (
            ("offsets", offsets_of(counts.clamp(max=most))),
            ("partners", partners[order]),
            ("residuals", residuals[order]),
        ):
            self.register_buffer(name, value, persistent=False)  # the run's ratings bring them
        self.met, self.rated = (nn.Parameter(torch.randn(sizes[1], width) * DEVIATION) for _ in range(2))
        self.dropout = dropout

    def forward(self, rows: Tensor, others: Tensor | None) -> tuple[Tensor, Tensor]:
        """Returns both sums (B, 2, D) and how many partners they hold (B,)."""
        within, places = spread(self.offsets, rows)
        kept = torch.ones_like(within, dtype=torch.bool)
        if others is not None:
            kept = self.partners[places] != others[within]
        if self.training and self.dropout:
            kept &= torch.rand(len(kept), device=kept.device) >= self.dropout
        within, places = within[kept], places[kept]
        counts = torch.bincount(within, minlength=len(rows))
        begins, partners = counts.cumsum(0) - counts, self.partners[places]
        met = lspm_kernels.embedding_bag(self.met, partners, begins)
        rated = lspm_kernels.embedding_bag(
            self.rated, partners, begins, per_sample_weights=self.residuals[places].to(self.rated.dtype)
        )
        return torch.stack((met, rated), 1) * (counts + 1.0).rsqrt()[:, None, None], counts


class Fields(nn.Module):
    """The fields of one side, users or items.

    Args:
        features: what is known of all rows.
        rows: how many.
        width: of an embedding.
        history: of the rows, or None.
    """

    def __init__(self, features: Features, rows: int, width: int, history: History | None = None) -> None:
        super().__init__()
        self.history = history
        self.id = nn.Parameter(torch.randn(rows, width) * DEVIATION)
        self.tables = nn.ParameterDict()
        for name, found in features.categories.items():
            self.tables[_key(name)] = nn.Parameter(torch.randn(len(found.names), width) * DEVIATION)
            self.register_buffer(f"values_{_key(name)}", found.values, persistent=False)
            self.register_buffer(f"offsets_{_key(name)}", found.offsets, persistent=False)
        numbers = [_standardised(numbers) for numbers in features.numbers.values()]
        numbers = torch.stack(numbers, 1) if numbers else torch.zeros(rows, 0)
        self.register_buffer("numbers", numbers, persistent=False)

    @property
    def count(self) -> int:
        """How many embeddings there are for a row."""
        return 1 + len(self.tables) + 2 * (self.history is not None)

    @property
    def dense(self) -> int:
        """How many numbers there are for a row."""
        return self.numbers.shape[1] + (self.history is not None)

    def forward(self, rows: Tensor, others: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Looks rows up.

        Args:
            rows: (B,) int64.
            others: (B,) int64, with whom each row is asked about, or None where it is anybody new.

        Returns:
            Embeddings (B, F, D) and numbers (B, M).
        """
        found = [F.embedding(rows, self.id)]
        for name, table in self.tables.items():
            offsets = getattr(self, f"offsets_{name}")
            _, places = spread(offsets, rows)
            counts = offsets[rows + 1] - offsets[rows]
            values = getattr(self, f"values_{name}")[places]
            found.append(lspm_kernels.embedding_bag(table, values, counts.cumsum(0) - counts, mode="mean"))
        embeddings, numbers = torch.stack(found, 1), self.numbers[rows]
        if self.history is not None:
            met, counts = self.history(rows, others)
            embeddings = torch.cat((embeddings, met), 1)
            numbers = torch.cat((numbers, counts.float().log1p()[:, None] / 5), 1)  # about 0 to 2
        return embeddings, numbers


def _key(name: str) -> str:
    """Returns a name that a module can have: "type" and the like are taken, and a dot is refused."""
    return "of_" + name.replace(".", ":")


def _standardised(numbers: Tensor) -> Tensor:
    """Returns numbers with mean 0 and deviation 1, and 0 where one is not known."""
    known = numbers[~numbers.isnan()]
    if len(known) < 2 or known.std() == 0:
        return torch.zeros_like(numbers)
    return ((numbers - known.mean()) / known.std()).nan_to_num(0.0)


def fields_of(
    training: Interactions, width: int, *, most: int = 0, dropout: float = 0.0
) -> tuple[Fields, Fields]:
    """Makes the fields of users and items, with histories of at most `most` training ratings."""
    ids = {"user": len(training.user_ids), "item": len(training.item_ids)}
    columns = {"user": training.users, "item": training.items}
    mean, of_users, of_items = damped_biases(training)
    residuals = training.ratings - mean - of_users[training.users] - of_items[training.items]
    sides = []
    for side, other in (("user", "item"), ("item", "user")):
        history = None
        if most:
            sizes = ids[side], ids[other]
            options = {"most": most, "dropout": dropout}
            history = History(columns[side], columns[other], residuals, sizes, width, **options)
        sides.append(Fields(getattr(training, f"{side}_features"), ids[side], width, history))
    return sides[0], sides[1]
