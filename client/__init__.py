"""What runs beside the data: the task a user brings, local training, and the statistics methods ask for."""
