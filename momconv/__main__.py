"""``python -m momconv`` is ``momconv``."""

from momconv.cli import main

if __name__ == "__main__":
    main()
