"""GGUF: every kind of tensor against plain Python, a whole model, and files that are damaged or hostile."""

import struct
import time
import tracemalloc
from dataclasses import replace

import numpy as np
import pytest
import tiny_gguf
import torch
from tiny_gguf import F32, KINDS, TEXT, U32, encoded, entry, field, gguf, llama_file, text

from lspm_models.gguf import GgufFile
from lspm_models.gguf_model import GgufModel
from lspm_models.sources import load_language_model


@pytest.fixture
def write(tmp_path):
    def write(content):
        path = tmp_path / "model.gguf"
        path.write_bytes(content)
        return path

    return write


@pytest.fixture(scope="module")
def llama():
    return llama_file()


@pytest.mark.parametrize("version", [2, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_tensors_are_what_their_bytes_stand_for(write, kind, version):
    torch.manual_seed(0)
    data, meant = encoded(torch.randn(3, 5, 64), kind)
    assert len(set(meant.flatten().tolist())) > 100
    path = write(gguf([], [("first", (32,), 0, bytes(128)), ("x", (3, 5, 64), KINDS[kind], data)], version))
    tensor = GgufFile(path).tensor("x")
    assert (tensor.dtype, tensor.shape) == (torch.float32, meant.shape)
    # a product and a sum in float32, where plain Python's are in float64
    torch.testing.assert_close(tensor, meant, rtol=2 * torch.finfo(torch.float32).eps, atol=1e-6)


def test_metadata_has_every_type(write):
    numbers = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 10: "<Q", 11: "<q", 12: "<d"}
    fields = [
        field(f"n{kind}", kind, struct.pack(code, 7)) for kind, code in numbers.items() if kind not in (4, 6)
    ]
    fields += [field("n4", U32, 7), field("n6", F32, 7.0), field("yes", 7, b"\1"), field("text", TEXT, "été")]
    fields += [field("texts", TEXT, ["a", "", "床"]), field("numbers", 5, [1, -2]), field("none", TEXT, [])]
    fields += [field("bools", 9, struct.pack("<IQ", 7, 2) + b"\1\0")]
    found = GgufFile(write(gguf(fields, []))).metadata
    assert all(found[f"n{kind}"] == 7 for kind in numbers)
    assert (found["yes"], found["text"], found["texts"], found["none"]) == (True, "été", ["a", "", "床"], [])
    assert found["numbers"].tolist() == [1, -2]
    assert found["bools"].tolist() == [True, False]


@torch.no_grad()
def test_a_llama_has_the_logits_of_its_weights(write, llama):
    content, task = llama
    loaded, _ = load_language_model(write(content))
    assert replace(loaded.config, eps=task.config.eps) == task.config
    assert loaded.config.eps == np.float32(1e-5)
    tokens = torch.randint(task.config.vocabulary_size, (2, 64))
    torch.testing.assert_close(loaded(tokens), task(tokens), rtol=1e-4, atol=1e-4)
    turned = loaded.state_dict()["model.layers.0.self_attn.q_proj.weight"]
    assert not torch.equal(tiny_gguf.interleaved(turned, 8), turned)


def test_its_tokenizer_merges_splits_digits_and_chats(write, llama):
    tokenizer = GgufModel(write(llama[0])).tokenizer()
    names = tokenizer._tokenizer.id_to_token
    assert [names(i) for i in tokenizer.encode("a the 10")] == ["a", "Ġthe", "Ġ", "1", "0"]
    gpt2 = GgufModel(write(llama_file("gpt-2")[0])).tokenizer()
    assert [names(i) for i in gpt2.encode("a the 10")] == ["a", "Ġthe", "Ġ", "10"]
    assert [names(i) for i in tokenizer.chat("the?")] == (
        ["<s>", "<s>", *"user:", "Ġthe", "?", "</s>", "<s>"]
    )
    assert [names(i) for i in tokenizer.chat("a", "be the")][:2] == ["<s>", "<s>"]
    assert "".join(names(i) for i in tokenizer.chat("a", "b")) == "<s><s>system:Ġb</s><s>user:Ġa</s><s>"
    assert tokenizer.decode([*tokenizer.encode("the end."), 2]) == "the end."
    assert 2 not in tokenizer.encode("</s>")
    assert (tokenizer.prompt(None), tokenizer.prompt("a"), tokenizer.stops) == ([1], [3], (2,))


HEAD = b"GGUF" + struct.pack("<IQQ", 3, 1, 0)
LONG = struct.pack("<Q", 2**63)


def array(kind, count):
    """The beginning of a field k with so many items."""
    return text("k") + struct.pack("<IIQ", 9, kind, count)


def one(shape=(32,), kind=0, offset=0, data=bytes(128), name="x"):
    """A file with one tensor."""
    head = HEAD + entry(name, shape, kind, offset)
    return head + bytes(-len(head) % 32) + data


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "must be a GGUF file, got an empty one"),
        (b"GG", "magic must be within the file, got its end at byte 2"),
        (b"GGML" + bytes(20), "magic must be GGUF, got b'GGML'"),
        (b"GGUF" + struct.pack("<IQQ", 1, 0, 0), "version must be 2 or 3, little endian, got 1"),
        (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "version must be 2 or 3, little endian, got 50331648"),
        (b"GGUF\3\0\0\0" + LONG, "number of tensors must fit the 0 bytes that follow, got 92233720368547"),
        (b"GGUF\3\0\0\0" + bytes(8) + LONG, "metadata fields must fit the 0 bytes that follow, got 922337"),
        (gguf([LONG + b"key" + bytes(21)], []), "length of metadata key must fit the 32 bytes that follow"),
        (gguf([text("k") + struct.pack("<I", 99)], []), "type of k must be 0 to 12, got 99"),
        (gguf([array(9, 1) + bytes(99)], []), "type of the items of k must be a number, a boolean or a text"),
        (gguf([array(8, 2**40)], []), "length of k must fit the"),
        (gguf([array(12, 2**61 + 1)], []), "length of k must fit the"),
        (gguf([field("k", U32, 1), field("k", U32, 1)], []), "metadata keys must differ, got k"),
        (gguf([field("k", TEXT, b"\xff\xfe")], []), r"k must be UTF-8, got b'\xff\xfe'"),
        (gguf([field("general.alignment", U32, 12)], []), "must be a positive multiple of 8, got 12"),
        (gguf([field("general.alignment", U32, 0)], []), "must be a positive multiple of 8, got 0"),
        (one(kind=10), "kind of x must be one of 0 (F32), 1 (F16), 2 (Q4_0)"),
        (one(shape=()), "dimensions of x must be 1 to 4, got 0"),
        (one(shape=(1,) * 5), "dimensions of x must be 1 to 4, got 5"),
        (one(shape=(0, 4)), "shape of x must be positive, got (0, 4)"),
        (one(shape=(2**32, 2**32)), "offset of x, of 73786976294838206464 bytes, must be a multiple of 32"),
        (one(shape=(2**62, 2**62, 4)), "offset of x, of 3402823669209384634633746074317682114"),
        (one(shape=(33,)), "offset of x, of 132 bytes, must be a multiple of 32 within the file, got 0"),
        (one(offset=32), "offset of x, of 128 bytes, must be a multiple of 32 within the file, got 32"),
        (one(offset=2**64 - 32), "must be a multiple of 32 within the file, got 18446744073709551584"),
        (one(offset=4, shape=(1,)), "of 4 bytes, must be a multiple of 32 within the file, got 4"),
        (one(shape=(2, 16), kind=8), "rows of x must be whole blocks of 32, got (2, 16)"),
        (gguf([], [("x", (8,), 0, bytes(32))] * 2), "names of tensors must differ, got x"),
    ],
)  # fmt: skip
def test_refuses_a_hostile_file(write, content, message):
    path = write(content)
    tracemalloc.start()
    began = time.process_time()
    with pytest.raises(ValueError) as error:
        GgufFile(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert str(error.value).startswith(f"gguf: {path}")
    assert message in str(error.value)
    assert peak < 1_000_000
    assert time.process_time() - began < 1


def test_refuses_a_path_that_is_not_there(tmp_path):
    with pytest.raises(ValueError, match=r"^gguf: .*none\.gguf must be a GGUF file, got no such file$"):
        load_language_model(tmp_path / "none.gguf")


def read_all(path):
    """Everything that loading does."""
    model = GgufModel(path)
    model.task()
    model.tokenizer()


SMALL = gguf(
    [field("general.alignment", U32, 32), field("a", TEXT, ["x"]), field("b", 5, [1]), field("c", F32, 1.0)],
    [("t", (2, 32), KINDS["Q4_1"], bytes(40)), ("u", (3,), KINDS["F32"], bytes(12))],
)  # fmt: skip


def flipped(content, positions):
    """A content with one byte changed, for each position and for each of three changes."""
    for at in positions:
        for bits in (1, 128, 255):
            yield content[:at] + bytes([content[at] ^ bits]) + content[at + 1 :]


def test_every_end_and_every_changed_byte_is_refused_or_read(write):
    end = len(SMALL) - 20  # of the last tensor, without what fills it up to 32 bytes
    tracemalloc.start()
    for content in [*(SMALL[:size] for size in range(len(SMALL))), *flipped(SMALL, range(len(SMALL)))]:
        path = write(content)
        try:
            file = GgufFile(path)
            assert len(content) >= end
            assert {name: len(file.tensor(name)) for name in file.tensors}
        except ValueError as error:
            assert str(error).startswith(f"gguf: {path}")
    assert tracemalloc.get_traced_memory()[1] < 3_000_000
    tracemalloc.stop()


def test_a_model_with_changed_bytes_is_refused_or_another_one(write, llama):
    content, refused, count = llama[0], 0, 0
    header = content.index(b"ffn_down", content.index(b"blk.1.ffn_up"))
    for changed in flipped(content, range(0, header, 13)):
        path = write(changed)
        count += 1
        try:
            read_all(path)
        except ValueError as error:
            assert str(path) in str(error)
            refused += 1
    assert count / 4 < refused < count


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (field("general.architecture", TEXT, "llama"), field("general.architecture", TEXT, "bloom"),
         "general.architecture must be llama, got bloom"),
        (field("tokenizer.ggml.model", TEXT, "gpt2"), field("tokenizer.ggml.model", TEXT, "bert"),
         "tokenizer.ggml.model must be gpt2, byte-level BPE, got bert"),
        (field("tokenizer.ggml.pre", TEXT, "smollm"), field("tokenizer.ggml.pre", TEXT, "falcon"),
         "tokenizer.ggml.pre must be one of gpt-2, smollm, got falcon"),
        (field("tokenizer.ggml.eos_token_id", U32, 2), field("tokenizer.ggml.eos_token_id", U32, 99),
         "model.gguf must be below 48, got 99"),
        (text("llama.block_count"), text("llama.block_counT"), "llama.block_count must be int, got none"),
        (field("llama.block_count", U32, 2), field("llama.block_count", U32, 4_000_000_000),
         "must have tensors, got 4000000000 for 20 tensors"),
        (field("llama.block_count", U32, 2), field("llama.block_count", U32, 3),
         "and 6 more, got none of them"),
        (field("llama.embedding_length", U32, 32), field("llama.embedding_length", U32, 40),
         "must be the head's 10, got 8"),
        (field("llama.attention.head_count", U32, 4), field("llama.attention.head_count", U32, 0),
         "must be the head's 0, got 8"),
        (field("llama.feed_forward_length", U32, 64), field("llama.feed_forward_length", U32, 2**31),
         "blk.0.ffn_gate.weight must have the config's shape (2147483648, 32), got (64, 32) in"),
        (text("th e"), text("th x"), "must be of tokens, got 'thx'"),
        (text("Ġthe"), text("Ġthx"), "must be of tokens, got 'Ġthe'"),
        (text("<e>"), text("<s>"), "tokenizer.ggml.tokens must differ, got 1 twice"),
        (b"{% endif %}", b"{% endfi %}", "chat: template must render a message, got TemplateSyntaxError"),
        (b"{{ bos_token }}", b"{{  1 //  0  }}", "chat: template must render a message, got ZeroDivision"),
        (b"{{ bos_token }}", b"{{ a.b.c.de  }}", "chat: template must render a message, got UndefinedError"),
    ],
)  # fmt: skip
def test_refuses_a_model_that_is_not_read(write, llama, old, new, message):
    assert llama[0].count(old) == 1
    with pytest.raises(ValueError) as error:
        path = write(llama[0].replace(old, new))
        read_all(path)
        GgufModel(path).tokenizer().chat("a")
    assert message in str(error.value)
