"""docs/saes.md, from what the formats say of themselves."""

from __future__ import annotations

import inspect

from fpo.scoring.sae import arrays
from fpo.scoring.sae.formats import FORMATS

_PAGE = """\
# SAE formats

<!-- written by `make docs` from scoring/sae -->

`features[].sae` names a folder, the weights file in it, or `owner/repo[@revision][/folder]` on the Hugging Face hub.
Where a folder holds one SAE per hookpoint, as sparsify writes them, the hookpoint chooses. A format is looked for by
the names of its files and recognised by the tensors in them: what no format claims, or two claim, is refused. From the
hub, only these files are downloaded.

`sae_lens:RELEASE/ID`, such as `sae_lens:gemma-scope-2b-pt-res-canonical/layer_20/width_16k/canonical`, is an SAE of
SAELens' registry. That library, which has to be installed, loads and converts it once; what it made is kept in
`sae_lens` under `HF_HOME` and read as SAELens' format, in its conventions where they differ from those below.

| format | files | recognised by | encoder | in the key |
|---|---|---|---|---|
{read}

Everything is computed in float32, from weights of any float type, as one of

{formulas}

with the bias that is subtracted from the input, its scale, and the norms of the decoder's rows folded into `W`, `b` and
the threshold. Only the encoder is read, and for the self-check the decoder.

## What is refused

| format | what | why |
|---|---|---|
{refused}

Refused in every format: weights that are cut short, missing, shaped otherwise than their encoder or the configuration
says, not finite, of no float type, or many times larger than the bytes that their file holds.

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
        formulas="\n".join(formulas),
        read="\n".join(read),
        refused="\n".join(f"| {', '.join(titles)} | {what} | {why} |" for (what, why), titles in refused.items()),
    )


def _said(documented: object) -> str:
    """Its docstring as one line."""
    return " ".join((inspect.getdoc(documented) or "").split())
