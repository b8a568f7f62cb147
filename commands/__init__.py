"""
The commands, one file each or per group: parse, call, print.

    cache  align  evaluate  features  compare  generate  judge  merge  schema  store

    options    what several take     caches    which store, which cache     bars     how far it is
    reports    of runs               sweep     fpo align, several runs      wording  sizes, ages, facts
    libraries  their chatter, off    ..._lines and ..._page: what evaluation found, for terminals and browsers

Every command imports what it works with when it is called: help and usage errors must not wait for libraries.
"""
