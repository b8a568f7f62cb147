"""
The commands, one file each or per group: parse, call, print.

    cache  align  evaluate  features  merge  schema  store

    options    what several take     caches         which store, which cache     bars     how far it is
    reports    of runs               feature_lines  of features                  wording  sizes, ages, facts
    libraries  their chatter, off    sweep          fpo align, several runs

Every command imports what it works with when it is called: help and usage errors must not wait for libraries.
"""
