"""At which layer does a language model know what it may forget of a prompt, for the word that comes next?

    python examples/causal_lm.py TEXT --out runs/lm

trains a small GPT-2 from scratch on TEXT, a file with a passage a line (so that no hub is needed), then a probe of its
inputs on beginnings of these passages, and asks the probe about beginnings that neither has seen. With a model of your
own, leave `language_model` out. `--quick` runs all of it in seconds, and what it finds then means nothing.
"""

import argparse
import random
from collections.abc import Sequence
from pathlib import Path

import torch
from tokenizers import ByteLevelBPETokenizer
from transformers import (
    DataCollatorForLanguageModeling,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedTokenizerFast,
    Trainer,
    TrainingArguments,
)

from diffmask_fast import Recipe, encode, explain, fresh_probe, save_probe, train_probe
from diffmask_fast.report import figure, html, terminal
from diffmask_fast.training.evaluation import attribution_metrics

BLOCK = 64  # tokens that the model takes at once


def tokenizer_of(passages: Sequence[str], words: int) -> PreTrainedTokenizerFast:
    pieces = ByteLevelBPETokenizer(add_prefix_space=True)
    pieces.train_from_iterator(passages, vocab_size=words, special_tokens=["<end>"], show_progress=False)
    return PreTrainedTokenizerFast(
        tokenizer_object=pieces._tokenizer, eos_token="<end>", pad_token="<end>", model_max_length=BLOCK
    )


def language_model(
    passages: Sequence[str], tokenizer: PreTrainedTokenizerFast, steps: int, out: Path
) -> GPT2LMHeadModel:
    rows = tokenizer([passage + "<end>" for passage in passages], verbose=False)["input_ids"]
    stream = [token for row in rows for token in row]
    blocks = [{"input_ids": stream[i : i + BLOCK]} for i in range(0, len(stream) - BLOCK, BLOCK)]
    config = GPT2Config(
        vocab_size=len(tokenizer), n_positions=BLOCK, n_embd=192, n_layer=4, n_head=6, bos_token_id=0, eos_token_id=0
    )
    model = GPT2LMHeadModel(config)
    arguments = TrainingArguments(
        output_dir=str(out / "model"),
        max_steps=steps,
        per_device_train_batch_size=16,
        learning_rate=2e-3,
        lr_scheduler_type="cosine",
        warmup_steps=steps // 20,
        logging_steps=max(1, steps // 10),
        save_strategy="no",
        report_to=[],
    )
    collator = DataCollatorForLanguageModeling(tokenizer, mlm=False)
    Trainer(model, arguments, data_collator=collator, train_dataset=blocks).train()
    return model.eval()


def beginnings(passages: Sequence[str], count: int, tokenizer: PreTrainedTokenizerFast) -> list[str]:
    """Prompts of 6 to 24 words that the model takes whole, all from passages of their own."""
    chosen = [passage.split() for passage in random.sample(passages, min(count, len(passages)))]
    prompts = [" ".join(words[: random.randint(6, 24)]) for words in chosen if len(words) > 6]
    return [prompt for prompt in prompts if len(tokenizer(prompt, verbose=False)["input_ids"]) <= BLOCK]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("text", type=Path)
    parser.add_argument("--out", type=Path, default=Path("runs/lm"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args()
    if not options.text.is_file():
        parser.error(f"there is no file {options.text}: give a text file with a passage a line")
    passages = [line.strip() for line in options.text.read_text(encoding="utf-8").splitlines() if line.strip()]
    if len(passages) < 100:
        parser.error(f"{options.text} has {len(passages)} lines that are not empty; expected at least 100")
    words, steps, count, epochs = (400, 10, 48, 1) if options.quick else (4096, 1500, 4000, 12)
    random.seed(options.seed)
    torch.manual_seed(options.seed)
    options.out.mkdir(parents=True, exist_ok=True)

    random.shuffle(passages)
    unseen, seen = passages[: len(passages) // 10], passages[len(passages) // 10 :]
    tokenizer = tokenizer_of(seen, words)
    model = language_model(seen, tokenizer, steps, options.out)

    recipe = Recipe(tolerance=0.5, epochs=epochs, batch_size=16)
    prompts = encode(
        tokenizer, beginnings(seen, count, tokenizer), model
    )  # a causal model: the kind is "what comes next"
    print(f"{len(prompts)} prompts to train the probe on")
    probe = fresh_probe(model, prompts, recipe, "input")
    train_probe(model, probe, prompts, recipe, options.out / "probe", seed=options.seed)
    save_probe(probe.eval(), options.out / "probe.safetensors")

    found = explain(model, probe, beginnings(unseen, 200, tokenizer), tokenizer)
    found.save(options.out / "attributions.safetensors")
    rows = attribution_metrics(found)
    columns = ("site", "KL", "kept of the prompt", "same next word", *(f"{n} from the end" for n in (1, 2, 3, 5)))
    lines = []
    for site, (name, row) in enumerate(zip(found.site_names, rows, strict=True)):
        near = [sum(one.keep[-n, site].item() for one in found) / len(found) for n in (1, 2, 3, 5)]
        lines.append([name, *(f"{value:.2f}" for value in (row["kl"], row["open"], row["kept_prediction"], *near))])
    terminal.table(f"{len(found)} prompts that neither model nor probe has seen", columns, lines)
    terminal.show(found[0])
    figure.heatmap(found[0], options.out / "prompt.png")
    figure.by_site(found, options.out / "by_site.png")
    html.write(found, options.out / "report.html", title="What may be forgotten before the next word")
    print(f"wrote {options.out}/prompt.png, by_site.png, report.html, attributions.safetensors, probe.safetensors")


if __name__ == "__main__":
    main()
