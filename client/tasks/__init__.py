"""The tasks that ship, by their names in configuration."""

SHIPPED = {
    "digits": "client.tasks.digits:Digits",
    "mnist": "client.tasks.mnist:Mnist",
    "fashion-mnist": "client.tasks.fashion_mnist:FashionMnist",
}
