"""The tests, a folder for each area. What several test files share stands in `common`: no test file
imports another. Every folder is a package, so that `tests.common` is found from the root of the
repository whichever file is run, and two files may have the same name.
"""
