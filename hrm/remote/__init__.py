"""Files behind URLs: reaching them through fsspec (`urls`), and keeping checked copies of them here (`cache`)."""
