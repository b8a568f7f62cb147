"""
Where the files of an SAE are: in a folder, or on the Hugging Face hub.

Only what a format names is downloaded: some folders hold gigabytes of examples beside the weights.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePath, PurePosixPath

from fpo.errors import SaeError
from fpo.scoring.hook_names import INPUT
from fpo.scoring.sae.format import Format, SaeFiles

_HUB_SOURCE = re.compile(r"^([\w-][\w.-]*/[\w-][\w.-]*?)(?:@([\w.-]+))?(?:/(.+?))?/?$")


def find_files(source: str, hookpoint: str | None, formats: Sequence[Format]) -> list[tuple[Format, SaeFiles]]:
    """
    The files of `source` for each of the formats whose weights file is there: a local folder or weights file, or
    `owner/repo[@revision][/folder]` on the hub.

    Where the folder holds one SAE per hookpoint, as sparsify writes them, `hookpoint` chooses among them. A weights
    file without a fixed name is named by the source, or is the only one in a local folder.
    Raises SaeError for a source that is not there or holds no weights file of any format.
    """
    local = Path(source).expanduser()
    if local.exists():
        return _find_local(source, local, hookpoint, formats)
    hub = _HUB_SOURCE.match(source)
    if hub is None:
        raise SaeError(f"SAE {source}: no such folder, and not a hub id (owner/repo/folder); {accepted(formats)}")
    return _find_on_hub(_HubRepository(source, hub[1], hub[2], formats), hub[3] or "", hookpoint)


def accepted(formats: Sequence[Format]) -> str:
    """What is read, for messages."""
    return "accepted: " + ", ".join(f"{known.title} ({', '.join(known.files)})" for known in formats)


def _find_local(
    source: str, path: Path, hookpoint: str | None, formats: Sequence[Format]
) -> list[tuple[Format, SaeFiles]]:
    if path.is_file():
        named = _named(path, formats)
        if not named:
            raise SaeError(f"SAE {source}: a file named {path.name}; {accepted(formats)}")
        return [(known, _local_files(source, path, known)) for known in named]
    for folder in [path, *([path / _inside_model(hookpoint)] if hookpoint else [])]:
        if found := [known for known in formats if (folder / known.weights).is_file()]:
            return [(known, _local_files(source, folder / known.weights, known)) for known in found]
    matching = sorted({file for known in formats for file in path.glob(known.weights) if file.is_file()})
    if len(matching) > 1:
        raise SaeError(f"SAE {source}: {_listing(matching)} may each be an SAE; name one of these files")
    if matching:
        return _find_local(source, matching[0], None, formats)
    raise SaeError(f"SAE {source}: no SAE here; found {_listing(path.iterdir())}; {accepted(formats)}")


def _local_files(source: str, weights: Path, known: Format) -> SaeFiles:
    config = _config(weights, known)
    found = Path(config) if config and Path(config).is_file() else None
    return SaeFiles(source, weights, found, Path(_folder(weights, known)).resolve().as_posix())


def _find_on_hub(hub: _HubRepository, path: str, hookpoint: str | None) -> list[tuple[Format, SaeFiles]]:
    """Files are asked for by name, so that one cached earlier is found without a connection."""
    folders = [path, *([f"{path}/{_inside_model(hookpoint)}".lstrip("/")] if hookpoint else [])]
    names = dict.fromkeys(known.weights for known in hub.formats if not _is_pattern(known))
    inside = [PurePosixPath(folder, name) for folder in folders for name in names]
    for file in [PurePosixPath(path)] if _named(PurePosixPath(path), hub.formats) else inside:
        if (weights := hub.download(file)) is not None:
            return [(known, hub.files(file, weights, known)) for known in _named(file, hub.formats)]
    if hub.unreachable:
        raise SaeError(
            f"SAE {hub.source}: no such folder here, not in the hub's cache, and the hub cannot be reached "
            f"({hub.unreachable[0]})"
        )
    where = " or ".join(map(repr, folders))
    raise SaeError(
        f"SAE {hub.source}: repository {hub.name} has no SAE in {where}; {accepted(hub.formats)}; "
        f"where such a name has a *, name the file"
    )


@dataclass(frozen=True)
class _HubRepository:
    source: str
    name: str
    revision: str | None
    formats: Sequence[Format]
    unreachable: list[str] = field(default_factory=list)
    """Why files that are not cached could not be asked for."""

    def files(self, file: PurePosixPath, weights: Path, known: Format) -> SaeFiles:
        config = _config(file, known)
        place = PurePosixPath(self.name, _folder(file, known)).as_posix()
        return SaeFiles(self.source, weights, self.download(config) if config else None, place)

    def download(self, file: PurePath) -> Path | None:
        """
        One file, through the hub's cache; None where the repository has no such file, or where it is not
        cached and the hub cannot be reached, which is then noted in `unreachable`.
        """
        from huggingface_hub import errors as hub
        from huggingface_hub import hf_hub_download

        try:
            return Path(hf_hub_download(self.name, file.as_posix(), revision=self.revision))
        except hub.LocalEntryNotFoundError as error:
            self.unreachable.append(type(error.__cause__ or error).__name__)
            return None
        except hub.EntryNotFoundError:
            return None
        except hub.GatedRepoError as error:
            raise SaeError(
                f"SAE {self.source}: {self.name} is gated; accept its licence and run `hf auth login`"
            ) from error
        except (hub.RepositoryNotFoundError, hub.RevisionNotFoundError, hub.HFValidationError) as error:
            where = f"{self.name}@{self.revision}" if self.revision else self.name
            raise SaeError(
                f"SAE {self.source}: neither a folder here nor a hub repository {where}; {accepted(self.formats)}"
            ) from error
        except (hub.HfHubHTTPError, OSError) as error:
            raise SaeError(f"SAE {self.source}: cannot download {file} ({type(error).__name__}: {error})") from error


def _named(path: PurePath, formats: Sequence[Format]) -> list[Format]:
    """The formats whose weights file has this path's name; those of a pattern only where it is nobody's own name."""
    named = [known for known in formats if path.match(known.weights)]
    return [known for known in named if not _is_pattern(known)] or named


def _is_pattern(known: Format) -> bool:
    return "*" in known.weights


def _folder(weights: PurePath, known: Format) -> PurePath:
    """The folder of the SAE whose weights file this is; it may stand deeper inside."""
    return weights.parents[known.weights.count("/")]


def _config(weights: PurePath, known: Format) -> PurePath | None:
    return _folder(weights, known) / known.config.replace("*", weights.stem) if known.config else None


def _inside_model(hookpoint: str) -> str:
    """sparsify names its folders by the path inside the base model, also a transcoder's: layers.10.mlp, h.3."""
    return re.sub(r"^(model|transformer|gpt_neox)\.", "", hookpoint.removesuffix(INPUT))


def _listing(paths: Iterable[Path]) -> str:
    names = sorted(path.name + "/" * path.is_dir() for path in paths)
    return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "") or "nothing"
