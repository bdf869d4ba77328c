"""Makes the three checkpoints beside this file with Ai2's own model code, and records what that code computes.

Not part of the tests: they read what this has written. It needs an environment of its own, since `ai2-olmo` 0.6.0
asks for libraries of its time; it also asks for numpy < 2, which its own dependencies no longer run on, hence
`--no-deps`:

    python3.11 -m venv olmo-env && . olmo-env/bin/activate
    pip install torch==2.13.0
    pip install numpy==2.2.6 'pandas<3' transformers==4.49.0 'datasets<4' omegaconf==2.3.0 boto3 cached_path \
        importlib_resources
    pip install --no-deps ai2-olmo==0.6.0
    python tests/data/original_olmo/make.py

Each folder then holds `config.json` as `hf_olmo` writes it, the weights as they are published, and `recorded.npz`:
`token_ids` (sequences, length), `logits` (sequences, length, rows of the embedding) and `hidden` (layers + 1,
sequences, length, width): the embeddings, the output of every block but the last, and the final norm's output.
"""

from pathlib import Path

HERE = Path(__file__).parent
# What all published models share.
COMMON = {
    "d_model": 32,
    "n_heads": 4,
    "n_layers": 3,
    "rope": True,
    "include_bias": False,
    "activation_type": "swiglu",
    "block_type": "sequential",
    "max_sequence_length": 64,
    "attention_dropout": 0.0,
    "residual_dropout": 0.0,
    "embedding_dropout": 0.0,
    "vocab_size": 101,
    "eos_token_id": 0,
    "pad_token_id": 1,
    "init_device": "cpu",
    "init_fn": "mitchell",
}
MODELS = {
    # OLMo-7B: clipped projections, a norm without weights, a padded vocabulary, a head of its own.
    "olmo_7b": {
        "clip_qkv": 1.0,
        "layer_norm_type": "default",
        "layer_norm_with_affine": False,
        "attention_layer_norm_with_affine": False,
        "bias_for_layer_norm": False,
        "multi_query_attention": False,
        "mlp_hidden_size": 88,
        "embedding_size": 128,
        "weight_tying": False,
    },
    # OLMo-1B: a tied head; the shared key and value heads and the other theta are no published model's.
    "olmo_1b": {
        "layer_norm_type": "low_precision",
        "layer_norm_with_affine": False,
        "n_kv_heads": 2,
        "mlp_ratio": 6,
        "rope_theta": 500,
        "embedding_size": None,
        "weight_tying": True,
    },
    # DataDecide: RMSNorm with weights.
    "datadecide": {
        "layer_norm_type": "rms",
        "layer_norm_with_affine": True,
        "layer_norm_eps": 1e-6,
        "attention_layer_norm_with_affine": False,
        "bias_for_layer_norm": False,
        "mlp_ratio": 4,
        "embedding_size": 128,
        "weight_tying": False,
    },
}
TEXT = (
    "Emma Woodhouse, handsome, clever, and rich, with a comfortable home and happy disposition, seemed to unite some "
    "of the best blessings of existence; and had lived nearly twenty-one years in the world with very little to "
    "distress or vex her. "
)


def text_ids():
    """The text as ids below the vocabulary size."""
    return [byte % 101 for byte in TEXT.encode()]


def trained(fields):
    """A model after 200 steps on the text, every parameter away from where it started."""
    import torch
    from olmo.config import ModelConfig
    from olmo.model import OLMo

    torch.manual_seed(0)
    config = ModelConfig.new(**COMMON, **fields)
    model = OLMo(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name or "ln_f" in name:
                parameter.copy_(0.5 + torch.rand_like(parameter))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    ids = torch.tensor(text_ids()).repeat(2)
    for _ in range(200):
        starts = torch.randint(len(ids) - 33, (8,))
        batch = torch.stack([ids[start : start + 33] for start in starts])
        logits = model(batch[:, :-1]).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    print(f"loss {loss.item():.3f}")
    return config, model.eval()


def publish(folder, config, model):
    """Write config.json and weights the way the published checkpoints were made."""
    import torch
    from hf_olmo import OLMoConfig, OLMoForCausalLM
    from hf_olmo.convert_olmo_to_hf import write_config, write_model
    from omegaconf import OmegaConf

    if folder.name == "datadecide":
        wrapped = OLMoForCausalLM(OLMoConfig(**config.asdict(), use_cache=True), model=model)
        wrapped.save_pretrained(folder, safe_serialization=True)
        (folder / "generation_config.json").unlink()
    else:
        OmegaConf.save({"model": config.asdict()}, folder / "config.yaml")
        torch.save(model.state_dict(), folder / "model.pt")
        write_config(str(folder))
        write_model(str(folder), ignore_olmo_compatibility=True)
        (folder / "config.yaml").unlink()


def record(folder, model):
    """Write what Ai2's code computes for a few sequences, random ids among them."""
    import numpy as np
    import torch

    random = np.random.default_rng(1)
    ids = np.stack([np.array(text_ids()[:24]), *random.integers(0, 101, size=(2, 24))])
    reached = []
    for block in model.transformer.blocks:
        block.att_proj.register_forward_hook(lambda _, __, out: reached.append(float(out.abs().max())))
    with torch.no_grad():
        output = model(torch.tensor(ids), output_hidden_states=True)
    print(f"{folder.name}: largest of q, k and v before the clip {max(reached):.2f}")
    hidden = torch.stack(output.hidden_states).numpy()
    np.savez_compressed(folder / "recorded.npz", token_ids=ids, logits=output.logits.numpy(), hidden=hidden)


def main():
    """Make all three."""
    for name, fields in MODELS.items():
        folder = HERE / name
        folder.mkdir(exist_ok=True)
        config, model = trained(fields)
        publish(folder, config, model)
        record(folder, model)


if __name__ == "__main__":
    main()
