"""The entry of a checkout; ratplus_exp/main.py has the command."""

from ratplus_exp.main import command

if __name__ == "__main__":
    command()
