"""`python -m loraone_init` is `loraone-init`."""

from .cli.init import main

if __name__ == "__main__":
    main()
