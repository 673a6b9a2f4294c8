"""Writes gpt2_parity.npz: a tiny random GPT-2 and what `transformers` computes with it.

Needs torch, transformers and safetensors (run in an environment of its own):

    python tests/golden/make_gpt2_parity.py

Every parameter gets noise: a fresh model has zero biases and unit norms, which would hide faults.
"""

import pathlib

import numpy as np
import torch
import transformers


def main() -> None:
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=61, n_positions=24, n_embd=16, n_layer=2, n_head=2, layer_norm_epsilon=3e-5
    )
    model = transformers.GPT2LMHeadModel(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
        tokens = torch.randint(0, config.vocab_size, (2, 24))
        out = model(tokens, output_hidden_states=True)
    arrays = {
        f"tensor {name}": value.numpy() for name, value in model.transformer.state_dict().items()
    }
    arrays |= {f"hidden {i}": hidden.numpy() for i, hidden in enumerate(out.hidden_states)}
    arrays |= {"tokens": tokens.numpy().astype(np.int32), "logits": out.logits.numpy()}
    for name in ("vocab_size", "n_positions", "n_embd", "n_layer", "n_head"):
        arrays[f"config {name}"] = np.array(getattr(config, name))
    arrays["config layer_norm_epsilon"] = np.array(config.layer_norm_epsilon)
    versions = f"torch {torch.__version__}, transformers {transformers.__version__}"
    arrays["versions"] = np.array(versions)
    path = pathlib.Path(__file__).with_name("gpt2_parity.npz")
    np.savez_compressed(path, **arrays)
    print(path.name, path.stat().st_size, versions)


if __name__ == "__main__":
    main()
