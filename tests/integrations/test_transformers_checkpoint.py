"""save_pretrained and from_pretrained of a quantized network, as docs/networks.md has it, in a process of its own."""

import subprocess
import sys
from pathlib import Path

import torch

from gaqat_optim import QuantConfig, convert, quantize_model

FRESH_PROCESS = """
import sys, torch
torch.set_num_threads(1)
from torchvision_import import import_torchvision
import_torchvision()
from transformers import BertForSequenceClassification
from gaqat_optim import QuantConfig, convert, quantize_model

class QuantizedBert(BertForSequenceClassification):
    def __init__(self, config):
        super().__init__(config)
        quantize_model(self, QuantConfig.from_dict(config.quant_config), inplace=True)

folder = sys.argv[1]
model, info = QuantizedBert.from_pretrained(folder, output_loading_info=True)
assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
ids, mask, deployed, logits = torch.load(f"{folder}/data.pt", weights_only=True)
with torch.no_grad():
    assert torch.equal(convert(model)(ids, attention_mask=mask).logits, deployed)
    assert torch.equal(model.eval()(ids, attention_mask=mask).logits, logits)
"""


def test_a_pretrained_folder_is_rebuilt_in_a_fresh_process(transformers, tmp_path):
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    config = transformers.BertConfig(**sizes, vocab_size=50, max_position_embeddings=16)
    ids, mask = torch.randint(0, 50, (8, 12)), torch.ones(8, 12, dtype=torch.long)
    mask[:4, 8:] = 0
    labels = torch.arange(8) % 2
    batch = {"input_ids": ids, "attention_mask": mask, "labels": labels}
    # The order of the overrides counts, and transformers sorts the keys of its JSON.
    quant_config = QuantConfig(4, 4, overrides={"bert.*": {"weight_bits": 3}, "*.query": {"weight_bits": 5}})
    model = quantize_model(transformers.BertForSequenceClassification(config), quant_config, calibration=[batch])
    optimizer = torch.optim.AdamW(model.train().parameters(), lr=1e-3)
    for _ in range(3):
        optimizer.zero_grad()
        model(**batch).loss.backward()
        optimizer.step()

    model.config.quant_config = model.quant_config.to_dict()
    model.save_pretrained(tmp_path)
    with torch.no_grad():
        deployed = convert(model)(ids, attention_mask=mask).logits
        logits = model.eval()(ids, attention_mask=mask).logits
    torch.save((ids, mask, deployed, logits), tmp_path / "data.pt")
    command = [sys.executable, "-c", FRESH_PROCESS, str(tmp_path)]
    subprocess.run(command, check=True, cwd=Path(__file__).parents[1])
