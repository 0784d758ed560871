"""All cases of the campaign."""

import functools

from tests.faults import commands, files, proofs, settings, surface, values

TABLES = (values, surface, proofs, settings, files, commands)


@functools.cache
def all_cases():
    return [case for table in TABLES for case in table.cases()]
