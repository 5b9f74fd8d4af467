"""The recurrences and the fused head-and-loss: one folder per operation, one public function, several implementations."""
