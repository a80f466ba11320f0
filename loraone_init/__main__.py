"""`python -m loraone_init` is `loraone-init`."""

from .cli import main

if __name__ == "__main__":
    main()
