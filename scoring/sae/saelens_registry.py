"""`sae_lens:RELEASE/ID`: an SAE by its names in SAELens' registry; that library loads it, its format is read."""

from __future__ import annotations

import tempfile
from importlib import metadata
from pathlib import Path

from fpo.errors import SaeError

_PREFIX = "sae_lens:"

# What the library raises for names that it does not know, and what comes up while it downloads and converts.
_FAILURES = (ImportError, ValueError, LookupError, TypeError, AttributeError, OSError, RuntimeError)


def on_disk(source: str) -> str:
    """
    For such a source the folder with what the library loads, kept beside the hub's cache for each version of it; any
    other source as it is. Raises SaeError where the library is missing or cannot load it.
    """
    if not source.startswith(_PREFIX):
        return source
    from huggingface_hub import constants

    release, _, sae_id = source.removeprefix(_PREFIX).partition("/")
    try:
        version = metadata.version("sae-lens")
    except metadata.PackageNotFoundError:
        raise SaeError(f"SAE {source}: needs SAELens itself: pip install sae-lens") from None
    folder = Path(constants.HF_HOME) / "sae_lens" / version / f"{release}--{sae_id.replace('/', '--')}"
    if not folder.is_dir():
        try:
            _save(release, sae_id, folder)
        except _FAILURES as error:
            reason = str(error).partition("\n")[0]
            raise SaeError(f"SAE {source}: sae-lens cannot load it ({type(error).__name__}: {reason})") from error
    return str(folder)


def _save(release: str, sae_id: str, folder: Path) -> None:
    """In one step: other processes may do the same at the same time."""
    from sae_lens import SAE
    from sae_lens.loading.pretrained_saes_directory import get_pretrained_saes_directory

    sae = SAE.from_pretrained(release, sae_id)
    # The registry has 0 where it does not know.
    sae.cfg.metadata.l0 = get_pretrained_saes_directory()[release].expected_l0[sae_id] or None
    for parameter in sae.parameters():
        # Some of its converters leave a transposed view, which safetensors does not write.
        parameter.data = parameter.data.contiguous()
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as made:
        sae.save_model(Path(made) / "sae")
        try:
            (Path(made) / "sae").rename(folder)
        except OSError:
            if not folder.is_dir():
                raise
