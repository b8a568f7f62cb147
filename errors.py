"""
What a user can cause, and what the command line answers with one clear line and exit code 1.

    FpoError
    ├── RecipeError       the recipe: unknown field, wrong type, impossible combination
    ├── DataError         the pairs: file, column, format, nothing left after the drops
    ├── ModelError        the model: files, hookpoint, a family that cannot be packed
    ├── SaeError          the SAE: files, architecture, width
    ├── SelfCheckError    the SAE does not fit what the hookpoint gives
    ├── CacheError        the store
    │   ├── CacheMissing      no such cache
    │   ├── CacheIncomplete   not sealed yet
    │   ├── CacheDamaged      bytes that are not what the manifest says
    │   ├── CacheConflict     something else already stands there
    │   └── CacheInUse        another process reads or writes it
    ├── ParityError       the policy does not reproduce the cached reference
    └── RunError          the run folder: exists already, or does not fit the recipe
        └── RunInterrupted    a signal ended the run, saved

A bug of ours is an AssertionError or anything else: the command line says so in one line that names the file with the
traceback.
"""

from __future__ import annotations


class FpoError(Exception):
    """Expected failure: the message says what, where, both values and the next step."""


class RecipeError(FpoError):
    pass


class DataError(FpoError):
    pass


class ModelError(FpoError):
    pass


class SaeError(FpoError):
    pass


class SelfCheckError(FpoError):
    pass


class CacheError(FpoError):
    pass


class CacheMissing(CacheError):
    pass


class CacheIncomplete(CacheError):
    pass


class CacheDamaged(CacheError):
    pass


class CacheConflict(CacheError):
    pass


class CacheInUse(CacheError):
    pass


class ParityError(FpoError):
    pass


class RunError(FpoError):
    pass


class RunInterrupted(RunError):
    def __init__(self, message: str, signum: int) -> None:
        super().__init__(message)
        self.signum = signum
