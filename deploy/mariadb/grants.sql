-- What each process may do in the database. Run it by an administrator, after the schema has been made or migrated:
--
--     cacert-mail db upgrade && mariadb cacertusers < deploy/mariadb/grants.sql
--
-- Running it again is safe: everything is taken back first, and then given. In between, for some milliseconds, requests are
-- refused and tried again. New users are locked, and no password fits; give each one, and unlock it, by hand:
--
--     ALTER USER 'api'@'%' IDENTIFIED BY '...' ACCOUNT UNLOCK;
--
-- A second run keeps password and state. '%' because API and mail hosts may be other machines; a firewall says which.
-- Roles and grants to PUBLIC are not used here and would not be taken back.

CREATE USER IF NOT EXISTS 'api'@'%' IDENTIFIED VIA mysql_native_password USING 'invalid' ACCOUNT LOCK;
CREATE USER IF NOT EXISTS 'worker'@'%' IDENTIFIED VIA mysql_native_password USING 'invalid' ACCOUNT LOCK;
CREATE USER IF NOT EXISTS 'service'@'%' IDENTIFIED VIA mysql_native_password USING 'invalid' ACCOUNT LOCK;
CREATE USER IF NOT EXISTS 'policy'@'%' IDENTIFIED VIA mysql_native_password USING 'invalid' ACCOUNT LOCK;
CREATE USER IF NOT EXISTS 'postfix'@'%' IDENTIFIED VIA mysql_native_password USING 'invalid' ACCOUNT LOCK;
CREATE USER IF NOT EXISTS 'dovecot'@'%' IDENTIFIED VIA mysql_native_password USING 'invalid' ACCOUNT LOCK;

REVOKE ALL PRIVILEGES, GRANT OPTION FROM 'api'@'%', 'worker'@'%', 'service'@'%', 'policy'@'%', 'postfix'@'%', 'dovecot'@'%';

-- api: writes what should be, asks for work, and never touches its progress.
GRANT SELECT, INSERT, UPDATE, DELETE ON cacertusers.domains TO 'api'@'%';
GRANT SELECT, INSERT, UPDATE, DELETE ON cacertusers.hosts TO 'api'@'%';
GRANT SELECT, INSERT, UPDATE ON cacertusers.dkim_keys TO 'api'@'%';
GRANT SELECT, INSERT, DELETE ON cacertusers.domain_senders TO 'api'@'%';
GRANT SELECT ON cacertusers.dns_checks TO 'api'@'%';
-- DELETE for aliases: a deleted user leaves a tombstone.
GRANT SELECT, INSERT, UPDATE, DELETE ON cacertusers.addresses TO 'api'@'%';
GRANT SELECT, INSERT, UPDATE ON cacertusers.aliases TO 'api'@'%';
GRANT SELECT, INSERT, UPDATE, DELETE ON cacertusers.alias_destinations TO 'api'@'%';
GRANT SELECT, INSERT, DELETE ON cacertusers.sender_rules TO 'api'@'%';
-- What Postfix reads, so that the answer to "who may send as this" is its own.
GRANT SELECT ON cacertusers.postfix_senders TO 'api'@'%';
GRANT SELECT, INSERT, UPDATE ON cacertusers.users TO 'api'@'%';
GRANT SELECT, INSERT, UPDATE ON cacertusers.principals TO 'api'@'%';
GRANT SELECT, INSERT, UPDATE (ends_at) ON cacertusers.principal_keys TO 'api'@'%';
GRANT SELECT, INSERT, UPDATE (used_at, cancelled_at) ON cacertusers.password_resets TO 'api'@'%';
GRANT SELECT, INSERT ON cacertusers.notices TO 'api'@'%';
GRANT SELECT, INSERT, UPDATE (revoked_at, last_used_at, last_used_from) ON cacertusers.app_passwords TO 'api'@'%';
GRANT SELECT, INSERT, UPDATE, DELETE ON cacertusers.login_failures TO 'api'@'%';
GRANT SELECT ON cacertusers.applied TO 'api'@'%';
GRANT SELECT ON cacertusers.host_status TO 'api'@'%';
GRANT SELECT, INSERT (host, lane, kind, subject_id, version, request_id, run_at, created_at)
    ON cacertusers.jobs TO 'api'@'%';
GRANT SELECT, INSERT ON cacertusers.audit_events TO 'api'@'%';
GRANT SELECT ON cacertusers.audit_chain TO 'api'@'%';
GRANT SELECT, INSERT, UPDATE (subject_id, subject_name) ON cacertusers.idempotency_keys TO 'api'@'%';
GRANT SELECT ON cacertusers.alembic_version TO 'api'@'%';

-- worker: root on a mail host. Sees accounts without their secrets, and writes what is.
GRANT SELECT ON cacertusers.worker_users TO 'worker'@'%';
GRANT SELECT ON cacertusers.worker_aliases TO 'worker'@'%';
GRANT SELECT ON cacertusers.worker_alias_destinations TO 'worker'@'%';
GRANT SELECT ON cacertusers.worker_dkim_keys TO 'worker'@'%';
GRANT SELECT ON cacertusers.domains TO 'worker'@'%';
GRANT SELECT ON cacertusers.hosts TO 'worker'@'%';
GRANT SELECT, UPDATE (state, run_at, attempts, fence, lease_until, running_lane, error, finished_at)
    ON cacertusers.jobs TO 'worker'@'%';
GRANT SELECT, INSERT, UPDATE ON cacertusers.applied TO 'worker'@'%';
GRANT SELECT, INSERT, UPDATE ON cacertusers.host_status TO 'worker'@'%';
GRANT SELECT ON cacertusers.alembic_version TO 'worker'@'%';

-- service: the queue's other consumer; prunes, and purges deleted accounts. It can clear a password hash, but not read one.
GRANT SELECT, DELETE,
    INSERT (host, lane, kind, subject_id, version, request_id, run_at, created_at),
    UPDATE (state, run_at, attempts, fence, lease_until, running_lane, error, finished_at)
    ON cacertusers.jobs TO 'service'@'%';
-- Nothing on `users`: with SELECT on any one column of a table, MariaDB's HANDLER reads its whole rows.
GRANT SELECT,
    UPDATE (display_name, contact_address, external_id, suspended_reason, version, updated_at, purged_at)
    ON cacertusers.service_users TO 'service'@'%';
GRANT SELECT (id), UPDATE (password_hash) ON cacertusers.service_purged TO 'service'@'%';
GRANT SELECT ON cacertusers.domains TO 'service'@'%';
-- It takes keys from state to state, and begins a rotation when its time has come.
GRANT SELECT, INSERT, UPDATE ON cacertusers.dkim_keys TO 'service'@'%';
GRANT SELECT ON cacertusers.domain_senders TO 'service'@'%';
GRANT SELECT, INSERT, UPDATE ON cacertusers.dns_checks TO 'service'@'%';
GRANT SELECT ON cacertusers.hosts TO 'service'@'%';
GRANT SELECT ON cacertusers.addresses TO 'service'@'%';
GRANT SELECT ON cacertusers.applied TO 'service'@'%';
GRANT SELECT ON cacertusers.host_status TO 'service'@'%';
GRANT SELECT, INSERT ON cacertusers.audit_events TO 'service'@'%';
GRANT SELECT, INSERT ON cacertusers.audit_chain TO 'service'@'%';
-- It sends the links, so it knows the file key that they are made with; what the row has of a link opens nothing.
GRANT SELECT, DELETE ON cacertusers.password_resets TO 'service'@'%';
GRANT SELECT, DELETE, UPDATE (sent_at, bounced_at, bounce, recipient) ON cacertusers.notices TO 'service'@'%';
GRANT SELECT, DELETE ON cacertusers.login_failures TO 'service'@'%';
GRANT SELECT, DELETE ON cacertusers.idempotency_keys TO 'service'@'%';
GRANT SELECT ON cacertusers.alembic_version TO 'service'@'%';

-- policy: who may send what, and how much.
GRANT SELECT ON cacertusers.policy_senders TO 'policy'@'%';
GRANT SELECT ON cacertusers.policy_logins TO 'policy'@'%';
GRANT SELECT ON cacertusers.alembic_version TO 'policy'@'%';

-- Postfix and Dovecot: their own lookups.
GRANT SELECT ON cacertusers.postfix_recipients TO 'postfix'@'%';
GRANT SELECT ON cacertusers.postfix_virtual_domains TO 'postfix'@'%';
GRANT SELECT ON cacertusers.postfix_local_aliases TO 'postfix'@'%';
GRANT SELECT ON cacertusers.postfix_virtual_aliases TO 'postfix'@'%';
GRANT SELECT ON cacertusers.postfix_own_domains TO 'postfix'@'%';
GRANT SELECT ON cacertusers.postfix_senders TO 'postfix'@'%';
GRANT SELECT ON cacertusers.postfix_logins TO 'postfix'@'%';
GRANT SELECT ON cacertusers.dovecot_users TO 'dovecot'@'%';
GRANT SELECT ON cacertusers.dovecot_passwords TO 'dovecot'@'%';
GRANT SELECT ON cacertusers.dovecot_app_passwords TO 'dovecot'@'%';
