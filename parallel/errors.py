"""The one exception for mistakes that a user can make and mend.

Its message names the key, the value and what was expected. The command line prints it once and ends with exit code 2;
it is raised before any process group or GPU is touched.
"""


class UserError(ValueError):
    """A recipe, a file or a command line that cannot work as written."""
