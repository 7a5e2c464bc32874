"""What matters to a Hugging Face model, in three lines: python examples/hugging_face.py MODEL "a fine film"

MODEL is the folder or hub name of a model that classifies texts.
"""

import sys

import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from diffmask_fast import attribute

if len(sys.argv) < 3:
    sys.exit("expected a model and at least one text: hugging_face.py MODEL TEXT...")
# many are stored in 16 bits, which a CPU is slow with
model = AutoModelForSequenceClassification.from_pretrained(sys.argv[1], dtype=torch.float32)
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
result = attribute(model, sys.argv[2:], tokenizer, method="leave-one-out")

for text in result:
    last = text.site_names.index("last")
    for token, *scores in zip(text.tokens, text.scores[:, 0].tolist(), text.scores[:, last].tolist(), strict=True):
        print(f"{token:>16}  embedding {scores[0]:+.3f}  last layer {scores[1]:+.3f}")
