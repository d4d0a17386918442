"""Tasks for the tests of exports, with a tiny BERT that is randomly initialized.

`Classify` predicts whether a sentence holds few or many words with an id below 15. `Fill` predicts all words of a sentence,
some of which are masked.
"""

import torch
from torch.nn import functional as F
from transformers import BertConfig, BertForMaskedLM, BertForSequenceClassification

from trainers.engine.device import to_device
from trainers.engine.task import Loss, Task

SIZE = dict(vocab_size=30, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
            max_position_embeddings=16, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)


class Sentences:
    def __init__(self, count, seed, device):
        self.words = torch.randint(1, 30, (count, 9), generator=torch.Generator().manual_seed(seed)).to(device)

    def __len__(self):
        return len(self.words)

    def batch(self, share):
        return self.words[to_device(share.indices, self.words.device)]


class Classify(Task):
    def data(self, world):
        return Sentences(200, 1, world.device), Sentences(50, 2, world.device)

    def model(self):
        return BertForSequenceClassification(BertConfig(num_labels=2, id2label={0: "few", 1: "many"}, **SIZE))

    def huggingface(self, model, folder):
        super().huggingface(model, folder)
        (folder / "vocab.txt").write_text("".join(f"word{i}\n" for i in range(30)))

    def loss(self, model, words):
        logits = model(input_ids=words).logits
        return Loss(F.cross_entropy(logits, ((words < 15).sum(1) > 4).long(), reduction="sum"), len(words))


class Fill(Classify):
    """The weights of the decoder are tied to those of the embedding."""

    def model(self):
        return BertForMaskedLM(BertConfig(**SIZE))

    def loss(self, model, words):
        logits = model(input_ids=words.where(words > 3, 0)).logits
        return Loss(F.cross_entropy(logits.flatten(0, 1), words.flatten(), reduction="sum"), words.numel())
