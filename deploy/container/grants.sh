#!/bin/sh
# Runs grants.sql as the database's root, and gives each user its password. Safe to run again. Then ends.
set -eu
sql() { mariadb --host=database.internal --user=root cacertusers; }

sql < /deploy/grants.sql
for user in api worker service postfix dovecot; do
    eval "password=\$$(echo "$user" | tr a-z A-Z)_PASSWORD"
    case $password in
    '' | *[!A-Za-z0-9_-]*) echo "The password of $user: letters, digits, - and _ only." >&2; exit 1 ;;
    esac
    echo "ALTER USER '$user'@'%' IDENTIFIED BY '$password' ACCOUNT UNLOCK;" | sql
done
