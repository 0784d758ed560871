"""All cases of the campaign."""

import functools

from tests.faults import commands, files, settings, surface, values

TABLES = (values, surface, settings, files, commands)


@functools.cache
def all_cases():
    return [case for table in TABLES for case in table.cases()]
