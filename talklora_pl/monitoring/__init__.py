"""What the experts do, seen from outside: metrics, figures, TensorBoard, sensitivity, inspection, its page, alerts."""
