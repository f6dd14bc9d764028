"""What tests share: tables of cases, laws, small models, runs in other processes."""
