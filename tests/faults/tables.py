"""All cases of the campaign."""

import functools

from tests.faults import commands, files, kinds, proofs, settings, surface, values

TABLES = (kinds, values, surface, proofs, settings, files, commands)


@functools.cache
def all_cases():
    return [case for table in TABLES for case in table.cases()]
