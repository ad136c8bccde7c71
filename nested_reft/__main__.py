"""`python -m nested_reft` is the command `nested-reft`."""

from nested_reft.command import main

if __name__ == "__main__":
    main()
