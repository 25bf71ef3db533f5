"""Models that accelerate promises to work with, of random weights: small ones to time, tiny ones to test."""

import functools
from collections.abc import Callable
from importlib.util import find_spec

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Built = tuple[nn.Module, dict]
MODELS: dict[str, Callable[[bool, int], Built]] = {}
PACKAGES: dict[str, str] = {}  # that models are from, by the models' names
TOKENS, CLASSES = 64, 10


def model(package: str) -> Callable:
    """Puts a function of (tiny, batch) into MODELS, which gives a model and a call's arguments by name."""

    def put(build: Callable[[bool, int], Built]) -> Callable[[bool, int], Built]:
        MODELS[build.__name__], PACKAGES[build.__name__] = build, package
        return build

    return put


def names() -> list[str]:
    """Of the models whose packages are here."""
    return [name for name in MODELS if find_spec(PACKAGES[name])]


def built(name: str, *, tiny: bool, batch: int, trains: bool) -> Built:
    """A model without dropout, and what it is called with: labels where it trains."""
    made, given = MODELS[name](tiny, batch)
    drop_nothing(made)
    if not trains:
        given.pop("labels", None)
    _keep_from_kinks(made, given)
    return made.train(trains), given


def drop_nothing(made: nn.Module) -> None:
    """Sets the share that a model's layers drop to 0."""
    for module in made.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        if isinstance(module, nn.MultiheadAttention):
            module.dropout = 0.0


def _keep_from_kinks(made: nn.Module, given: dict) -> None:
    """Has batch norms give what is far from where a ReLU bends, on either side, and know their statistics.

    Of millions of numbers around 0 a few are so near it that rounding decides whether they have a gradient.
    """
    norms = [module for module in made.modules() if isinstance(module, nn.BatchNorm2d)]
    for norm in norms:
        nn.init.uniform_(norm.weight, 0.05, 0.1)
        dead = torch.rand(norm.num_features) < 0.25
        norm.bias.data = torch.where(dead, -100.0, 1.0)
        norm.momentum = 1.0
    if norms:
        with torch.no_grad():
            made.train()(**{name: torch.cat([value, value]) for name, value in given.items()})
    for norm in norms:
        norm.momentum = 0.1


def logits_of(out: Tensor | dict) -> Tensor:
    """The tensor in what a model gives."""
    return out if isinstance(out, Tensor) else out["logits"] if "logits" in out else out["out"]


def loss_of(out: Tensor | dict) -> Tensor:
    """The loss in what a model gives in training; where it gives features, a weighted mean of them."""
    if not isinstance(out, Tensor) and "loss" in out:
        return out["loss"]
    features = logits_of(out)
    return (features * torch.linspace(-1, 2, features.numel()).view_as(features)).mean()


def _transformers(kind: str, sizes: dict, given: dict, **options) -> Built:
    import transformers

    cls = getattr(transformers, kind)
    return cls(cls.config_class(**sizes, **options)), given


def _sentences(batch: int, vocabulary: int) -> dict:
    ids = torch.randint(3, vocabulary, (batch, TOKENS))
    return {"input_ids": ids, "labels": ids}


def _padded(batch: int, vocabulary: int) -> dict:
    """Of two sentences or more the first is half as long."""
    given = _sentences(batch, vocabulary)
    mask = torch.ones_like(given["input_ids"])
    mask[: batch - 1, TOKENS // 2 :] = 0
    labels = given["labels"].masked_fill(mask == 0, -100)
    return {"input_ids": given["input_ids"] * mask, "attention_mask": mask, "labels": labels}


def _decoder(kind: str, tiny: bool, batch: int, **options) -> Built:
    sizes = {
        "hidden_size": 128 if tiny else 576,
        "intermediate_size": 256 if tiny else 1536,
        "num_hidden_layers": 2 if tiny else 4,
        "num_attention_heads": 4 if tiny else 9,
        "num_key_value_heads": 2 if tiny else 3,
        "vocab_size": 97 if tiny else 8192,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": None,
    }
    return _transformers(kind, sizes, _padded(batch, sizes["vocab_size"]), **options)


@model("transformers")
def gpt2(tiny: bool, batch: int) -> Built:
    sizes = {"n_layer": 2, "n_embd": 128, "n_head": 4, "vocab_size": 97} if tiny else {"n_layer": 4}
    special = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None, "attn_pdrop": 0.0}
    given = _sentences(batch, sizes.get("vocab_size", 50257))
    return _transformers("GPT2LMHeadModel", sizes, given, **special)


@model("transformers")
def bert(tiny: bool, batch: int) -> Built:
    sizes = {"hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 4, "vocab_size": 97}
    sizes = {"num_hidden_layers": 2, **sizes} if tiny else {"num_hidden_layers": 4}
    given = _padded(batch, sizes.get("vocab_size", 30522))
    given["labels"] = torch.arange(batch) % 2
    options = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    return _transformers("BertForSequenceClassification", sizes, given, **options)


@model("transformers")
def llama(tiny: bool, batch: int) -> Built:
    return _decoder("LlamaForCausalLM", tiny, batch)


@model("transformers")
def qwen2(tiny: bool, batch: int) -> Built:
    return _decoder("Qwen2ForCausalLM", tiny, batch)


@model("transformers")
def qwen3(tiny: bool, batch: int) -> Built:
    return _decoder("Qwen3ForCausalLM", tiny, batch, head_dim=32 if tiny else 64)


@model("transformers")
def t5(tiny: bool, batch: int) -> Built:
    sizes = {"d_model": 128, "d_kv": 32, "d_ff": 256, "num_layers": 2, "num_heads": 4, "vocab_size": 97}
    special = {"pad_token_id": 0, "eos_token_id": None, "decoder_start_token_id": 1, "dropout_rate": 0.0}
    given = _padded(batch, 97 if tiny else 32128)
    given["decoder_input_ids"] = given["input_ids"]
    return _transformers("T5ForConditionalGeneration", sizes if tiny else {}, given, **special)


@model("transformers")
def vit(tiny: bool, batch: int) -> Built:
    size = 64 if tiny else 224
    sizes = {"hidden_size": 128 if tiny else 384, "intermediate_size": 256 if tiny else 1536}
    sizes |= {"num_hidden_layers": 2 if tiny else 4, "num_attention_heads": 4 if tiny else 6}
    sizes |= {"image_size": size, "patch_size": 8 if tiny else 16, "num_labels": CLASSES}
    given = {"pixel_values": torch.randn(batch, 3, size, size), "labels": torch.arange(batch) % CLASSES}
    return _transformers("ViTForImageClassification", sizes, given)


@model("transformers")
def whisper(tiny: bool, batch: int) -> Built:
    layers, heads = (2, 4) if tiny else (4, 6)
    sizes = {
        "d_model": 128 if tiny else 384,
        "encoder_layers": layers,
        "decoder_layers": layers,
        "encoder_attention_heads": heads,
        "decoder_attention_heads": heads,
        "encoder_ffn_dim": 256 if tiny else 1536,
        "decoder_ffn_dim": 256 if tiny else 1536,
        "max_source_positions": 64 if tiny else 256,
        "vocab_size": 97 if tiny else 51865,
        "num_mel_bins": 16 if tiny else 80,
    }
    special = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
    features = torch.randn(batch, sizes["num_mel_bins"], 2 * sizes["max_source_positions"])
    labels = _sentences(batch, sizes["vocab_size"])["labels"]
    given = {"input_features": features, "decoder_input_ids": labels, "labels": labels}
    return _transformers("WhisperForConditionalGeneration", sizes, given, **special)


def _image(tiny: bool, batch: int) -> dict:
    """Smooth images, and of two or more tiny ones, which are so small, in channels_last memory."""
    small = tiny and batch > 1
    coarse = torch.randn(batch, 3, 2, 3)
    x = F.interpolate(coarse, (96, 112) if small else (224, 224), mode="bilinear")
    return {"x": x.contiguous(memory_format=torch.channels_last) if small else x}


def _classifier(tiny: bool, batch: int, *, name: str) -> Built:
    import torchvision

    return getattr(torchvision.models, name)(num_classes=CLASSES), _image(tiny, batch)


for _name in "resnet18 resnet50 resnext50_32x4d mobilenet_v2 mobilenet_v3_small squeezenet1_1".split():
    MODELS[_name], PACKAGES[_name] = functools.partial(_classifier, name=_name), "torchvision"


@model("torchvision")
def densenet121(tiny: bool, batch: int) -> Built:
    import torchvision

    sizes = (8, (2, 2, 2), 16) if tiny else (32, (6, 12, 24, 16), 64)
    return torchvision.models.DenseNet(*sizes, num_classes=CLASSES), _image(tiny, batch)


@model("torchvision")
def deeplab(tiny: bool, batch: int) -> Built:
    import torchvision

    build = torchvision.models.segmentation.deeplabv3_mobilenet_v3_large
    made = build(weights=None, weights_backbone=None, num_classes=CLASSES)
    return made, _image(tiny, batch)


class Detector(nn.Module):
    """A detector of torchvision with its losses as one, and what it finds as one tensor."""

    def __init__(self, detector: nn.Module):
        super().__init__()
        self.detector = detector

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        if not self.training:
            found = self.detector(list(images))
            return {"logits": torch.cat([one["boxes"].flatten() for one in found])}
        box = images.new_tensor([[30.0, 40.0, 120.0, 150.0]])
        targets = [{"boxes": box, "labels": torch.ones(1, dtype=torch.int64)} for _ in images]
        losses = self.detector(list(images), targets)
        return {"loss": sum(losses.values()), "logits": torch.stack(list(losses.values()))}


@model("torchvision")
def faster_rcnn(tiny: bool, batch: int) -> Built:
    import torchvision

    build = torchvision.models.detection.fasterrcnn_mobilenet_v3_large_320_fpn
    size = 160 if tiny else 320
    options = {"min_size": size, "max_size": 2 * size, "trainable_backbone_layers": 6}
    made = build(weights=None, weights_backbone=None, num_classes=CLASSES, **options)
    return Detector(made), {"images": torch.rand(batch, 3, size, size)}


@model("torch")
def transformer(tiny: bool, batch: int) -> Built:
    sizes = (64, 4, 2, 2, 128) if tiny else (256, 8, 4, 4, 1024)
    made = nn.Transformer(*sizes, batch_first=True)
    tokens = 256 if tiny else 128
    return made, {name: torch.randn(batch, tokens, sizes[0]) for name in ("src", "tgt")}


class Lightning(nn.Module):
    """A module as people write them for Lightning: layers in a Sequential, a loss, a step of training."""

    def __init__(self, features: int):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(64, features), nn.GELU(), nn.LayerNorm(features))
        self.head = nn.Linear(features, CLASSES)
        self.loss = nn.CrossEntropyLoss()

    def forward(self, x: Tensor, y: Tensor) -> dict[str, Tensor]:
        return self.training_step((x, y), 0) if self.training else {"logits": self.head(self.body(x))}

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> dict[str, Tensor]:
        x, y = batch
        logits = self.head(self.body(x))
        return {"loss": self.loss(logits, y), "logits": logits}


@model("torch")
def lightning(tiny: bool, batch: int) -> Built:
    rows = 128 * batch
    return Lightning(256 if tiny else 1024), {"x": torch.randn(rows, 64), "y": torch.arange(rows) % CLASSES}


@model("timm")
def timm_resnet(tiny: bool, batch: int) -> Built:
    import timm

    return timm.create_model("resnet18", num_classes=CLASSES), _image(tiny, batch)


@model("timm")
def timm_vit(tiny: bool, batch: int) -> Built:
    import timm

    size = {"embed_dim": 128, "depth": 2, "num_heads": 4} if tiny else {"depth": 4}
    made = timm.create_model("vit_small_patch16_224", num_classes=CLASSES, **size)
    return made, _image(False, batch)
