"""docs/saes.md, from what the formats say of themselves."""

from __future__ import annotations

import inspect

from fpo.scoring.hook_names import from_transformer_lens
from fpo.scoring.sae import arrays
from fpo.scoring.sae.formats import FORMATS

_SITES = (
    "hook_resid_pre",
    "hook_resid_mid",
    "hook_resid_post",
    "hook_attn_out",
    "hook_mlp_out",
    "attn.hook_z",
    "mlp.hook_in",
)
"""What TransformerLens calls the places inside a layer."""

_PAGE = """\
# SAE formats

<!-- written by `make docs` from scoring/sae -->

`features[].sae` names a folder, the weights file in it, or `owner/repo[@revision][/folder]` on the Hugging Face hub.
Where a folder holds one SAE per hookpoint, as sparsify writes them, the hookpoint chooses. A format is looked for by
the names of its files and recognised by the tensors in them: what no format claims, or two claim, is refused. A file
whose name has a `*` below is named itself, unless it is the only such file of a local folder. From the hub, only these
files are downloaded.

`sae_lens:RELEASE/ID`, such as `sae_lens:gemma-scope-2b-pt-res-canonical/layer_20/width_16k/canonical`, is an SAE of
SAELens' registry. That library, which has to be installed, loads and converts it once; what it made is kept in
`sae_lens` under `HF_HOME` and read as SAELens' format, in its conventions where they differ from those below.

| format | files | recognised by | encoder | in the key |
|---|---|---|---|---|
{read}

Everything is computed in float32, from weights of any float type, as one of

{formulas}

with the bias that is subtracted from the input, its scale, and the norms of the decoder's rows folded into `W`, `b` and
the threshold. Only the encoder is read, and for the self-check the decoder. A transcoder's features are those of its
encoder; its decoder is held against the place that it predicts.

## Where an SAE reads

`features[].hookpoint` is a path that `named_modules()` of the model shows: `model.layers.12` is what layer 12 gives,
`model.layers.12.mlp` what its MLP gives. `model.layers.N` is understood for every family. With `:input` behind it, it
is what the module reads: `model.layers.12.mlp:input`, `model.layers.12.self_attn.o_proj:input` (the attention heads,
concatenated). Left out, it is the place that the SAE's files name. These names of others are understood, too:

| name | Llama, Qwen, Mistral | Gemma 2, Gemma 3 | GPT-2 |
|---|---|---|---|
{places}
| `layers.12.mlp`, `h.12.mlp` (sparsify) | `model.layers.12.mlp` | the same | the same |

`hidden_states[i]` of transformers is what layer i - 1 gives, but for the last one, which stands behind the final norm
and is no place that an SAE was trained on.

## What is refused

| format | what | why |
|---|---|---|
{refused}

Refused in every format: weights that are cut short, missing, shaped otherwise than their encoder or the configuration
says, not finite, of no float type, or many times larger than the bytes that their file holds. Of a pickle (`.pt`,
`.pth`) only tensors are loaded: one that asks for a class or a function is refused, and nothing in it is run.

## Another format

One module in `scoring/sae/` with a subclass of `Format` (`claims`, `facts`, `read`, `read_decoder`, and what it
refuses), its line in `FORMATS` of `scoring/sae/formats.py`, a test that writes the formula out, and `make docs`.
"""


def formats_page() -> str:
    formulas = [line for line in (arrays.__doc__ or "").splitlines() if line.startswith("    ")]
    read, refused = [], dict[tuple[str, str], list[str]]()
    for known in FORMATS:
        files = ", ".join(f"`{name}`" for name in known.files)
        read.append(f"| {known.title} | {files} | {_said(known.claims)} | {_said(type(known))} | `{known.name}` |")
        for reason in known.refuses.items():
            refused.setdefault(reason, []).append(known.title)
    return _PAGE.format(
        places="\n".join(_place(site) for site in _SITES),
        formulas="\n".join(formulas),
        read="\n".join(read),
        refused="\n".join(f"| {', '.join(titles)} | {what} | {why} |" for (what, why), titles in refused.items()),
    )


def _place(site: str) -> str:
    """A TransformerLens name in the words of three families."""
    name = f"blocks.12.{site}"
    found = (from_transformer_lens(name, family) for family in ("llama", "gemma-2", "gpt2"))
    return f"| `{name}` | " + " | ".join(f"`{path}`" for path in found) + " |"


def _said(documented: object) -> str:
    """Its docstring as one line."""
    return " ".join((inspect.getdoc(documented) or "").split())
