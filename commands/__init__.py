"""
The commands, one file each or per group: parse, call, print.

    cache  align  evaluate  schema  store   options    what several take     bars     how far it is
    caches  which store, which cache        libraries  their chatter, off    wording  sizes, ages, facts

Every command imports what it works with when it is called: help and usage errors must not wait for libraries.
"""
