from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import interpreter
import pytest
import torch
from torch import Tensor

if interpreter.ON:
    interpreter.round_to_nearest()


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real data and small models: DIFFMASK_FAST_SHARED, or ``shared`` beside the repository."""
    path = Path(os.environ.get("DIFFMASK_FAST_SHARED") or Path(__file__).parents[2] / "shared")
    if path.is_dir():
        return path
    reason = f"there is no folder {path}: set DIFFMASK_FAST_SHARED to the folder of real data"
    if os.environ.get("CI") == "true":
        pytest.fail(reason)
    pytest.skip(reason)


WORDS = (
    "[PAD] [UNK] [CLS] [SEP] [MASK] who what where when is was the a an in of to on film fine dull old new "
    "city river house dog cat tree bird fish king queen red blue green paris rome münchen 東 京 1 2 3 , . ? ! "
    "##s ##ed ##ing build walk play sing year"
).split()


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    """A WordPiece tokenizer of sixty words, as a Hugging Face one."""
    tokenizers = pytest.importorskip("tokenizers")
    transformers = pytest.importorskip("transformers")
    vocabulary = {word: i for i, word in enumerate(WORDS)}
    raw = tokenizers.Tokenizer(tokenizers.models.WordPiece(vocabulary, unk_token="[UNK]"))
    raw.normalizer = tokenizers.normalizers.BertNormalizer(lowercase=True, strip_accents=False)
    raw.pre_tokenizer = tokenizers.pre_tokenizers.BertPreTokenizer()
    raw.post_processor = tokenizers.processors.BertProcessing(
        ("[SEP]", vocabulary["[SEP]"]), ("[CLS]", vocabulary["[CLS]"])
    )
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=raw,
        unk_token="[UNK]",
        pad_token="[PAD]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        mask_token="[MASK]",
        model_max_length=32,
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
    )


@pytest.fixture(scope="session")
def tiny_bert() -> Callable[..., Any]:
    """tiny_bert(head): a BERT of two layers, 16 wide, with that head and always the same random weights."""
    transformers = pytest.importorskip("transformers")
    import torch

    def make(head: str = "ForSequenceClassification", **settings: Any) -> Any:
        torch.manual_seed(0)
        config = transformers.BertConfig(
            vocab_size=len(WORDS),
            hidden_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=32,
            max_position_embeddings=32,
            initializer_range=0.4,  # so that predictions differ from one text to the next
            **settings,
        )
        return getattr(transformers, f"Bert{head}")(config).eval()

    return make


@pytest.fixture(scope="module")
def classifier(tiny_bert: Any) -> Any:
    return tiny_bert()


@pytest.fixture(scope="module")
def reader(tiny_bert: Any) -> Any:
    return tiny_bert("ForQuestionAnswering")


@pytest.fixture(scope="session")
def qa_folder(tmp_path_factory: pytest.TempPathFactory, tiny_bert: Callable[..., Any], tokenizer: Any) -> Path:
    """The folder of a small question-answering model with random weights."""
    folder = tmp_path_factory.mktemp("models") / "qa"
    tiny_bert("ForQuestionAnswering").save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(autouse=True)
def distributions_validate() -> None:
    """torch.compile turns the validation of all distributions off, for the whole process and for good."""
    torch.distributions.Distribution.set_default_validate_args(True)


@pytest.fixture
def poisoned_memory() -> Iterator[None]:
    """Fresh memory is full of NaN, so that an output that nobody writes shows."""
    before = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)
    torch.utils.deterministic.fill_uninitialized_memory = before


class Case(NamedTuple):
    states: Tensor
    logits: Tensor
    baseline: Tensor
    seed: Tensor


@pytest.fixture
def case() -> Callable[..., Case]:
    """Makes inputs of `gate_mix`, the same each time."""

    def make(
        leading: tuple[int, ...] = (3, 7),
        width: int = 37,
        gates: int = 4,
        baseline: tuple[int, ...] | None = None,
        dtype: torch.dtype = torch.float32,
        seed: int = 0,
    ) -> Case:
        generator = torch.Generator().manual_seed(seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator)

        logits_dtype = torch.float64 if dtype == torch.float64 else torch.float32
        return Case(
            normal(*leading, width).to(dtype).requires_grad_(),
            (normal(*leading, gates) * 2 + 1).to(logits_dtype).requires_grad_(),
            normal(*(baseline or (width,))).to(logits_dtype).requires_grad_(),
            torch.tensor([1234567890123456789 + seed, -5]),
        )

    return make
