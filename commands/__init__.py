"""
The commands, one file each or per group: parse, call, print.

    cache  align  evaluate  merge  schema  store    options    what several take     bars     how far it is
    sweep   fpo align, several runs                 reports    of runs               wording  sizes, ages, facts
    caches  which store, which cache                libraries  their chatter, off

Every command imports what it works with when it is called: help and usage errors must not wait for libraries.
"""
